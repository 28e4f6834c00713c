"""`bem safety fit | check | report`: bases that adapters cannot write into, and the violation detector."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bem.errors import ConfigError, DataError

if TYPE_CHECKING:
    from bem.safety.basis import SafetyBasis
    from bem.safety.detector import Checked

safety_app = typer.Typer(
    help="Fit a safety basis, check a text or an adapter, and read what both are worth.",
    no_args_is_help=True,
)
REJECTED = 1
BaseName = Annotated[
    str, typer.Option("--base", help="A name of `bem base list`, a folder, a hub id.")
]


@safety_app.command()
def fit(
    harmful: Annotated[Path, typer.Option("--harmful", help='JSONL (or .gz) rows {"input"}.')],
    harmless: Annotated[
        list[Path], typer.Option("--harmless", help="The same; may be given several times.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the basis.")],
    base: BaseName = "bem-tiny",
    most: Annotated[int, typer.Option("--most", min=20, help="Prompts of each kind.")] = 250,
    keep: Annotated[int, typer.Option("--keep", min=1, help="Blocks to protect.")] = 2,
    directions: Annotated[int, typer.Option("--directions", min=1, max=8)] = 4,
    kappa: Annotated[
        float, typer.Option("--kappa", min=0, max=1, help="Where the harmless KL is limited.")
    ] = 0.3,
    kl_limit: Annotated[float, typer.Option("--kl-limit", help="Nats per token.")] = 0.05,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> int:
    """Find the directions in which a base tells harmful from harmless prompts, and judge them held out."""
    from bem.bases.load import load_base
    from bem.safety.fit import FitOptions, fit_basis

    bad, good = _rows([harmful], most, seed), _rows(harmless, most, seed)
    console = Console()
    model, tokenizer = load_base(base)
    options = FitOptions(
        keep=keep, directions=directions, kappa=kappa, kl_limit=kl_limit, seed=seed
    )
    basis = fit_basis(
        model,
        tokenizer,
        [r["input"] for r in bad],
        [r["input"] for r in good],
        options,
        [(r.get("meta") or {}).get("category") for r in bad],
        lambda line: console.print(f"[dim]{escape(line)}[/]"),
    )
    basis.write(out)
    _show_basis(console, basis)
    console.print(f"[green]accepted[/], written to {escape(str(out))}")
    return 0


@safety_app.command()
def check(
    text: Annotated[
        str | None, typer.Argument(help="A text for the violation detector; - reads stdin.")
    ] = None,
    basis: Annotated[
        Path | None, typer.Option("--basis", help="Folder of a basis: checked against --adapter.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="A checkpoint or a saved router.")
    ] = None,
    base: BaseName = "bem-tiny",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, without the text.")] = False,
) -> int:
    """Check a text (exit code 1: flagged), or what an adapter writes into a safety basis."""
    if (text is None) == (basis is None):
        raise ConfigError("give a text, or --basis with --adapter: `bem safety check --help`.")
    console = Console()
    if text is not None:
        from bem.safety.detector import ViolationDetector

        checked = ViolationDetector().check(sys.stdin.read() if text == "-" else text)
        _show_checked(console, checked, as_json)
        return REJECTED if checked.flagged else 0
    if basis is None or adapter is None:
        raise ConfigError("--basis needs --adapter: the folder of what is to be checked.")
    leaks = _leaks(basis, adapter, base)
    if as_json:
        print(json.dumps(leaks))
        return 0
    worst = max(leaks.values(), key=lambda pair: pair["before"], default={"before": 0, "after": 0})
    console.print(
        f"{len(leaks)} writers at or below a protected block. As saved, the worst writes {worst['before']:.2%} of its "
        f"norm into the basis; under the guard {max((x['after'] for x in leaks.values()), default=0.0):.1e}."
    )
    return 0


@safety_app.command()
def report(
    basis: Annotated[Path | None, typer.Argument(help="Folder of a safety basis.")] = None,
    audit: Annotated[
        Path | None, typer.Option("--audit", help="Audit log of a policy: what was done, counted.")
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Of a server: what its guard did since it started.")
    ] = None,
    key: Annotated[str | None, typer.Option("--key", envvar="BEM_API_KEY")] = None,
) -> int:
    """What the detector that ships, and a basis, were accepted on; what a guard did."""
    from bem.safety.detector import SHIPPED, ViolationDetector

    console = Console()
    detector = ViolationDetector()
    limits = ", ".join(f"{c.name} above {c.limit:.2f}" for c in detector.weights.categories)
    console.print(f"[bold]violation detector[/] flags {limits}; card: {SHIPPED / 'README.md'}")
    if basis is not None:
        from bem.safety.basis import read_basis

        _show_basis(console, read_basis(basis))
    if audit is not None:
        from bem.safety.audit import counted

        counts, torn = counted(audit)
        said = f" ({torn} lines torn)" if torn else ""
        _show_counts(console, f"audit log {audit}{said}", dict(counts))
    if url is not None:
        _show_server(console, url, key)
    return 0


def _show_server(console: Console, url: str, key: str | None) -> None:
    from bem.serving.client import Client

    guard = Client(url.rstrip("/").removesuffix("/v1"), key).get("/dashboard/data").get("guard")
    if guard is None:
        console.print(f"{escape(url)} has no policy: start it with --policy.")
        return
    up = "runs" if guard["detector"] else "does not run"
    title = f"guard of {url}: its detector {up}, {guard['failures']} texts were not checked"
    _show_counts(console, title, {(r["place"], r["category"], r["action"]): r["texts"] for r in guard["counts"]})  # fmt: skip


def _show_counts(console: Console, title: str, counts: dict[tuple[str, str, str], int]) -> None:
    table = Table("place", "category", "action", "texts", title=escape(title), title_justify="left")
    for (place, category, action), texts in sorted(counts.items()):
        table.add_row(place, category, action, str(texts))
    console.print(table)


def _rows(paths: list[Path], most: int, seed: int) -> list[dict[str, Any]]:
    """At most so many rows, an equal share of each file."""
    import random

    from bem.files import json_lines

    found: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        rows = [row for _, row in json_lines(path)]
        if odd := [r for r in rows if not isinstance(r, dict) or not isinstance(r.get("input"), str)]:  # fmt: skip
            raise DataError(f"{path}: a row has no text under 'input': {str(odd[0])[:60]}")
        random.Random(seed + number).shuffle(rows)
        found += rows[: -(-most // len(paths))]
    return found[:most]


def _leaks(basis: Path, adapter: Path, base: str) -> dict[str, dict[str, float]]:
    """Site -> share of a writer's norm inside the basis, as it was saved and under the guard."""
    from bem.adapters.attach import load
    from bem.bases.load import load_base
    from bem.routing.mount import load_router
    from bem.routing.mounted import is_router
    from bem.safety.basis import read_basis
    from bem.safety.knob import Knob
    from bem.safety.protect import Guard, protect

    read = read_basis(basis)
    model, _ = load_base(base)
    attached = load_router(model, adapter) if is_router(adapter) else load(model, adapter)
    before = Guard(attached, read, Knob()).leaks()
    after = protect(attached, read).leaks()
    return {site: {"before": leak, "after": after[site]} for site, leak in before.items()}


def _show_checked(console: Console, checked: Checked, as_json: bool) -> None:
    found = [{"category": f.category, "score": f.score, "limit": f.limit, "reason": f.reason} for f in checked.findings]  # fmt: skip
    personal = [vars(p) for p in checked.personal]
    if as_json:
        print(json.dumps({"flagged": checked.flagged, "score": checked.score, "scores": checked.scores, "findings": found, "personal": personal}))  # fmt: skip
        return
    console.print("[red]flagged[/]" if checked.flagged else "[green]nothing found[/]")
    for finding in checked.findings:
        console.print(f"  {escape(finding.reason)}")
    for each in checked.personal:
        console.print(f"  personal data: {each.kind} at characters {each.start} to {each.end}")


def _show_basis(console: Console, basis: SafetyBasis) -> None:
    table = Table(
        "block", "held-out AUROC", "along one direction", "best of 100 random", "protected"
    )
    protected = {layer.block for layer in basis.layers}
    for t in basis.about["tried"]:
        value, low, high = t["held_out_auroc"]
        table.add_row(
            str(t["block"]),
            f"{value:.3f} [{low:.3f}, {high:.3f}]",
            f"{t['first_direction_auroc']:.3f}",
            f"{t['best_of_random']:.3f}",
            f"{t['directions']} directions" if t["block"] in protected else "",
        )
    console.print(f"[bold]safety basis[/] {basis.digest[:12]} of base {basis.base[:12]}")
    console.print(table)
    kl = ", ".join(f"{k}: {v:.4f}" for k, v in basis.about["harmless_kl"].items())
    console.print(f"harmless KL in nats per token, by kappa: {kl}")
    console.print("not covered: " + "; ".join(basis.about["not covered"]))
