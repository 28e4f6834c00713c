"""`bem demo`: what this product does, on this machine, in minutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from bem.cli.console import Terminal
from bem.cli.conversation import show_routed
from bem.cli.demo_guard import show_guard
from bem.cli.display import Display, quiet
from bem.cli.options import command
from bem.cli.verdict import show_decision
from bem.errors import BaseError, CheckpointError, MissingExtra, NotAccepted
from bem.report import words

if TYPE_CHECKING:
    from bem.config import ExperimentConfig
    from bem.experiments.run import RunResult
    from bem.releases.named import Shipped
    from bem.runs.store import Store

STORY = (
    "BEM adapts a frozen language model while it runs, chunk by chunk, and puts a change into use only when paired "
    "statistics say that it is better. What was compared here:"
)


@dataclass(frozen=True)
class Done:
    """One finished half."""

    config: ExperimentConfig
    result: RunResult

    @property
    def headline(self) -> str:
        """The verdict in plain words."""
        verdict = words.headline(self.result.verdicts, self.config.baseline.name)
        return f"On {self.config.base}: {verdict}"


def demo(
    output: Annotated[str, typer.Option("--output", help="Folder of the runs.")] = "runs",
    rows: Annotated[
        int,
        typer.Option("--rows", min=4, max=1000, help="Held-out rows of each task, second half."),
    ] = 10,
) -> int:
    """Train and judge a small comparison, then judge a shipped router on a real base, then learn from corrections.

    The real base is fetched once (93 MB); where that is not possible the first half is done alone. The first
    line of the output is the verdict; what happens meanwhile is told on stderr.
    """
    from bem.cli.demo_online import learn_online
    from bem.experiments import demos

    progress, console = Console(stderr=True), Terminal()
    quiet()
    first = _run(progress, demos.tiny(output), "1 of 2: a small comparison, trained here")
    second, why = None, _missing(demos.SHOWN)
    if why is None:
        config = demos.of_release(demos.SHOWN, output, rows)
        second = _run(progress, config, f"2 of 2: the release {demos.SHOWN.name}, measured here")
    _tell(console, first, second, demos.SHOWN, why)
    _keep(console, second or first, demos.SHOWN if second else None)
    learn_online(console, progress, output)
    show_guard(console)
    for done in filter(None, (second, first)):
        _print(console, f"Report: {done.result.report}")
    return 0


def _run(progress: Console, config: ExperimentConfig, title: str) -> Done:
    from bem.experiments import run as runner

    progress.print(Text(title, "bold"))
    with Display(progress) as display:
        done = Done(config, runner.run(config, display.show, command=command()))
    progress.print(Text(done.headline), soft_wrap=True)
    return done


def _missing(release: Shipped) -> str | None:
    """Why a release cannot be measured here; None: it can. Its base is fetched unless it is here."""
    from bem.bases.load import find_base

    try:
        find_base(release.config.base)
    except (BaseError, CheckpointError, MissingExtra) as error:
        return str(error)
    return None


def _tell(
    console: Console, first: Done, second: Done | None, release: Shipped, why: str | None
) -> None:
    """What came out, whatever it is; the verdict on the real base, if there is one, comes first."""
    _print(console, (second or first).headline, "bold")
    _print(console, f"\n{STORY}")
    _part(console, 1, f"candidates for {first.config.base}, trained and judged here", first)
    if second is None:
        _print(console, f"\n2. Left out, a shipped router on a real base: {why}")
        return
    title = (
        f"the router of {release.name} on {second.config.base}, against the static LoRA beside it; trained before, "
        "measured and judged here"
    )
    _part(console, 2, title, second)
    show_routed(console, second.result.folder, second.config)
    _print(console, f"\nThe run that {release.name} comes from: {release.verdict}")


def _part(console: Console, number: int, title: str, done: Done) -> None:
    _print(console, f"\n{number}. {title[:1].upper()}{title[1:]}:", "bold")
    for verdict in done.result.verdicts.values():
        show_decision(console, verdict)
    if changes := words.gate_changes(done.config.gates):
        _print(console, f"Gates other than the defaults: {changes}.", "dim")


def _keep(console: Console, done: Done, release: Shipped | None) -> None:
    """Put into use what a verdict allows, and nothing else; a release that none allows is kept beside."""
    from bem.runs.promotion import store_of

    store = store_of(done.result.folder)
    try:
        said = _kept(done, release, store)
    except (NotAccepted, CheckpointError) as error:
        said = f"Nothing was put into {store.path}: {error}"
    _print(console, f"\n{said}")


def _kept(done: Done, release: Shipped | None, store: Store) -> str:
    from bem.runs.promotion import import_release, promote

    folder, better = done.result.folder, _best(done)
    if better and (other := _of_somebody_else(store)):
        return (
            f"{store.path} has {other} in use, which the demo does not replace. "
            f"`bem promote {folder} {better}` does."
        )
    if better:
        promoted = promote(folder, better, store=store)
        return (
            f"{better} is in use in {store.path}, version {promoted.short}, as its verdict allows."
        )
    if release is None:
        return f"No verdict on {done.config.base} says PROMOTE, so nothing was put into use for it."
    kept = import_release(store, release.address)
    base = f"{done.config.base} --dtype {done.config.dtype}"
    return (
        f"No verdict on {done.config.base} says PROMOTE, so nothing was put into use for it. {release.name} is kept in "
        f"{store.path}, version {kept.short}: `bem serve --base {base}` answers as bem@{kept.short}."
    )


def _best(done: Done) -> str | None:
    """Of the candidates that may be promoted, the one that gains most."""
    gains = {
        name: effect.gain if (effect := words.best_effect(verdict)) else 0.0
        for name, verdict in done.result.verdicts.items()
        if verdict.accepted
    }
    return max(gains, key=gains.__getitem__, default=None)


def _of_somebody_else(store: Store) -> str | None:
    """What is in use there, unless a demo put it there."""
    if not store.path.exists():
        return None
    release = store.load_current().release
    return None if release is None or release.source.startswith("demo-") else release.source


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)
