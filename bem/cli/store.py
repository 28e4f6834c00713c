"""`bem promote | rollback | history` and `bem store`: which adapter is in use, and how it came to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from bem.cli.console import Terminal

if TYPE_CHECKING:
    from bem.runs.release import Release
    from bem.runs.store import Store

DEFAULT = Path("runs/store")
COLOURS = {"promote": "green", "rollback": "yellow", "repair": "yellow", "abandon": "red"}

store_app = typer.Typer(help="The version store: import, check, repair, collect.", no_args_is_help=True)  # fmt: skip

Folder = Annotated[Path, typer.Option("--store", help="Folder of the version store.")]
By = Annotated[
    str | None, typer.Option("--by", help="Who stands in the ledger; default: your account.")
]
Reason = Annotated[str, typer.Option("--reason", help="Why; it stands in the ledger.")]


def promote(
    run: Annotated[Path, typer.Argument(help="Folder of a run: runs/NAME.")],
    arm: Annotated[str, typer.Argument(help="The arm whose adapter goes into use.")],
    seed: Annotated[
        int | None, typer.Option("--seed", help="Which seed's checkpoint; default: the first.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="Folder of the version store; default: store beside the run."),
    ] = None,
    by: By = None,
) -> int:
    """Put an arm's adapter into use; refused unless its verdict says PROMOTE and still holds."""
    from bem.runs import promotion
    from bem.runs.store import Store

    target = Store(store or promotion.store_of(run).path, by)
    release = promotion.promote(run, arm, seed, target)
    _say("Promoted", f" {release.source}: version {release.short}", target)
    return 0


def rollback(
    version: Annotated[
        str | None,
        typer.Argument(
            help="Digits that a version begins with, or `base` for the bare base; default: what was in use before."
        ),
    ] = None,
    reason: Reason = "",
    store: Folder = DEFAULT,
    by: By = None,
) -> int:
    """Go back to what was in use before, or to a version that once was. Needs a --reason."""
    from bem.runs.store import Store

    target = Store(store, by)
    _say("Rolled back", f" to {_name(target.rollback(version, reason=reason))}", target)
    return 0


def history(store: Folder = DEFAULT) -> int:
    """Show what was put into use, by whom, when, and by which verdict; the newest last."""
    from bem.runs.store import Store

    target = Store(store)
    ledger, taken = target.journal.ledger(), target.load_current()
    table = Table(box=None, pad_edge=False)
    for column in ("", "when (UTC)", "by", "what", "version", "verdict", "why"):
        table.add_column(column, no_wrap=column not in ("by", "why"))
    for entry in ledger.entries:
        what = f"{entry.event} {entry.about}" if entry.about else entry.event
        cells = (str(entry.number), entry.at[:19].replace("T", " "), entry.by)
        digests = (_digits(entry.version), _digits(entry.verdict))
        colour = COLOURS.get(entry.event, "")
        table.add_row(*map(Text, cells), Text(what, colour), *map(Text, (*digests, entry.reason)))
    console = Terminal()
    console.print(table)
    console.print(Text(f"In use: {_name(taken.release)}: {taken.why}"), soft_wrap=True)
    for problem in (problem for problem in taken.problems if problem not in taken.why):
        console.print(Text.assemble(("Damaged: ", "red"), problem), soft_wrap=True)
    return 1 if taken.problems else 0


@store_app.command("import")
def import_one(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of a static adapter or of a router with its experts; or a release: bem-smol."
        ),
    ],
    store: Folder = DEFAULT,
    by: By = None,
) -> int:
    """Keep an adapter that nobody judged here: it can be served by its version, it is not put into use."""
    from bem.runs.promotion import import_release
    from bem.runs.store import Store

    target = Store(store, by)
    release = import_release(target, folder)
    _say("Imported", f" {release.source}: version {release.short}, not in use", target)
    return 0


@store_app.command()
def check(store: Folder = DEFAULT) -> int:
    """Look at every byte of the store; exit code 1 if something is damaged."""
    from bem.runs import upkeep
    from bem.runs.store import Store

    problems, console = upkeep.check(Store(store)), Terminal()
    for problem in problems:
        console.print(Text.assemble(("Damaged: ", "red"), problem), soft_wrap=True)
    if not problems:
        console.print(Text(f"{store}: everything is as it was written."), soft_wrap=True)
    return 1 if problems else 0


@store_app.command()
def repair(store: Folder = DEFAULT, reason: Reason = "bem store repair", by: By = None) -> int:
    """Bring pointer and ledger back in step after damage; what is damaged is kept beside it."""
    from bem.runs import upkeep
    from bem.runs.store import Store

    target = Store(store, by)
    repaired = upkeep.repair(target, reason)
    done = "; ".join(repaired.done) or f"nothing to do, {_name(repaired.release)} is in use"
    _say("Repaired:", f" {done}", target)
    return 0


@store_app.command()
def collect(
    keep: Annotated[int, typer.Option("--keep", help="How many releases stay at least.")] = 5,
    store: Folder = DEFAULT,
    by: By = None,
) -> int:
    """Throw away old releases and the files that none names; what is in use and the one before it stay."""
    from bem.runs import upkeep
    from bem.runs.store import Store

    target = Store(store, by)
    gone = upkeep.collect(target, keep)
    what = f" {len(gone.releases)} releases and {gone.objects} files, {gone.bytes / 1e6:.1f} MB"
    _say("Collected", what, target)
    return 0


def _say(head: str, what: str, store: Store) -> None:
    console = Terminal()
    console.print(Text.assemble((head, "green"), what), soft_wrap=True)
    console.print(Text(f"Store: {store.path}"), soft_wrap=True)


def _name(release: Release | None) -> str:
    return f"version {release.short}, {release.source}" if release else "the bare base"


def _digits(digest: str | None) -> str:
    return digest[:12] if digest else "-"
