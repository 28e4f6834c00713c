"""`bem validate`: what the statistics allow."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bem.cli.console import Terminal
from bem.config import load_gates
from bem.errors import ConfigError
from bem.files import write_json
from bem.report import words as wording

if TYPE_CHECKING:
    from bem.stats import Measurement, Verdict

COLOURS = {"PROMOTE": "green", "REJECT": "red", "INCONCLUSIVE": "yellow"}
EXIT_CODES = {"PROMOTE": 0, "REJECT": 1, "INCONCLUSIVE": 2}


GatesFile = Annotated[Path | None, typer.Option("--gates", help="YAML with the gates to change.")]
Primary = Annotated[
    list[str] | None,
    typer.Option("--primary", metavar="METRIC", help="Judge by this metric; may be repeated."),
]
Ignored = Annotated[
    list[str] | None,
    typer.Option("--ignore", metavar="COLUMN", help="Leave this column out; may be repeated."),
]


def validate(
    baseline: Annotated[Path, typer.Argument(help="Scores of the baseline.")],
    candidates: Annotated[list[Path], typer.Argument(help="Scores of the candidates.")],
    gates: GatesFile = None,
    primary: Primary = None,
    ignore: Ignored = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the verdicts here.")] = None,
) -> int:
    """Judge score files from any source.

    A file is a measurement.json of ours, samples of lm-eval, or a table (CSV, JSON Lines, JSON array)
    with one row per example: `id`, one column per metric (em f1 validity acc in 0..1, chrf bleu in 0..100,
    loss; any other as `name:higher:100` or `name:lower`), and if you have them `seed`, `cluster` or `group`
    (source document) and `slice:NAME`. Costs (budget, latency, memory, cache) that no file holds are
    waived, and every verdict says so.

    Exit code: 0 PROMOTE, 1 REJECT, 2 INCONCLUSIVE, 3 a problem that the message explains.
    With several candidates: 0 if any is promoted, else 2 if any is inconclusive, else 1.
    """
    from bem.stats import judge, with_shared_groups
    from bem.stats.costs import costs_not_measured

    _keep_the_inputs(out, [baseline, *candidates])
    opponent, measured = _read(baseline, candidates, ignore or ())
    limits = load_gates(gates)
    waived = {*limits.waived, *costs_not_measured([opponent, *measured.values()])}
    limits = limits.model_copy(update={"waived": tuple(sorted(waived))})
    family = _family(primary, opponent)
    shared = with_shared_groups(opponent, measured)
    verdicts = judge(shared, measured, limits, family)
    if out:
        write_json(out, {name: verdict.to_dict() for name, verdict in verdicts.items()})
    console = Terminal()
    for verdict in verdicts.values():
        _show(console, verdict)
    decisions = [verdict.decision for verdict in verdicts.values()]
    best = next((d for d in ("PROMOTE", "INCONCLUSIVE") if d in decisions), "REJECT")
    return EXIT_CODES[best]


def _keep_the_inputs(out: Path | None, inputs: Sequence[Path]) -> None:
    if out and any(out.resolve() == path.resolve() for path in inputs):
        raise ConfigError(f"--out {out} would replace a file of scores: name another one.")


def _read(
    baseline: Path, candidates: Sequence[Path], ignore: Sequence[str]
) -> tuple[Measurement, dict[str, Measurement]]:
    """The baseline, and the candidates by name."""
    from bem.stats import load
    from bem.stats.columns import canonical

    opponent = load(baseline, ignore=ignore)
    paths = _names(candidates)
    measured = {name: load(path, ignore=ignore) for name, path in paths.items()}
    sides = (opponent, *measured.values())
    present = {canonical(name) for side in sides for name in side.meta.get("ignored", ())}
    for name in ignore:
        if canonical(name) not in present:
            raise ConfigError(f"--ignore {name}: no file has a column of that name.")
    return opponent, measured


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    """A name for each candidate: its file's; with its folder where two files are called alike."""
    from bem.stats.score_table import stem

    short = [stem(path) for path in paths]
    names = short if len(set(short)) == len(short) else [str(p.parent / stem(p)) for p in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"Two candidates are called {twice}: give each file once, or rename one.")
    return dict(zip(names, paths, strict=True))


def _family(primary: Sequence[str] | None, opponent: Measurement) -> list[str] | None:
    """The metrics to judge by; None: the statistics' own choice."""
    from bem.stats.columns import canonical

    metrics = [*opponent.metrics, *opponent.corpus]
    family = [canonical(name) for name in primary or ()]
    for name in family:
        if name not in metrics:
            close = get_close_matches(name, metrics, 1)
            hint = f"Did you mean {close[0]!r}?" if close else f"It has: {', '.join(metrics)}."
            raise ConfigError(f"--primary {name}: {opponent.name} has no such metric. {hint}")
    return list(dict.fromkeys(family)) or None


def show_decision(console: Console, verdict: Verdict) -> None:
    """One line: who, what was decided, and why."""
    line = Text.assemble(
        (verdict.candidate, "bold"),
        (f" {verdict.decision} ", COLOURS[verdict.decision]),
        wording.sentence(verdict),
    )
    console.print(line, soft_wrap=True, highlight=False)


def _show(console: Console, verdict: Verdict) -> None:
    show_decision(console, verdict)
    table = Table("", "check", "value", "limit", "why", box=None, pad_edge=False)
    marks = {
        "pass": Text("pass", "green"), "fail": Text("fail", "red"), "unknown": Text("?", "yellow")
    }  # fmt: skip
    for gate in wording.gates(verdict):
        cells = (Text(cell) for cell in (gate.name, gate.value, gate.limit, gate.why))
        table.add_row(marks[gate.state], *cells)
    console.print(table)
    if verdict.waived:
        console.print(Text(f"Waived: {', '.join(verdict.waived)}.", "dim"))
    if verdict.not_judged:
        console.print(Text(f"Not judged: {'; '.join(verdict.not_judged)}.", "dim"))
    console.print()
