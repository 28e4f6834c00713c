"""`bem validate` and `bem promote`: what the statistics allow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bem.config import GatesConfig, parse
from bem.errors import ConfigError
from bem.files import write_json
from bem.report import words as wording

if TYPE_CHECKING:
    from bem.stats import Measurement, Verdict

COLOURS = {"PROMOTE": "green", "REJECT": "red", "INCONCLUSIVE": "yellow"}
EXIT_CODES = {"PROMOTE": 0, "REJECT": 1, "INCONCLUSIVE": 2}


def validate(
    baseline: Annotated[Path, typer.Argument(help="Scores of the baseline: JSON, CSV or JSONL.")],
    candidates: Annotated[list[Path], typer.Argument(help="Scores of the candidates.")],
    gates: Annotated[
        Path | None, typer.Option("--gates", help="YAML with the gates to change.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the verdicts here.")] = None,
) -> int:
    """Judge score files from any source.

    A file is a measurement.json of ours, or a CSV or JSONL table with one row per example: `id`,
    one column per metric (em f1 validity in 0..1, chrf bleu in 0..100, loss; any other as
    `name:higher:100` or `name:lower`), and if you have them `seed`, `cluster` (source document)
    and `slice:NAME`. Costs (budget, latency, memory, cache) that no file holds are waived, and
    every verdict says so.

    Exit code: 0 PROMOTE, 1 REJECT, 2 INCONCLUSIVE, 3 a problem that the message explains.
    With several candidates: 0 if any is promoted, else 2 if any is inconclusive, else 1.
    """
    from bem.stats import judge, load

    opponent = load(baseline)
    measured = {path.name.partition(".")[0]: load(path) for path in candidates}
    if len(measured) < len(candidates):
        raise ConfigError("Two candidates have the same file name; rename one: it is their name.")
    limits = _gates(gates)
    absent = _absent_costs([opponent, *measured.values()])
    limits = limits.model_copy(update={"waived": tuple(sorted({*limits.waived, *absent}))})
    verdicts = judge(opponent, measured, limits)
    console = Console()
    for verdict in verdicts.values():
        _show(console, verdict)
    if out:
        write_json(out, {name: verdict.to_dict() for name, verdict in verdicts.items()})
    decisions = [verdict.decision for verdict in verdicts.values()]
    best = next((d for d in ("PROMOTE", "INCONCLUSIVE") if d in decisions), "REJECT")
    return EXIT_CODES[best]


def promote(
    run: Annotated[Path, typer.Argument(help="Folder of a run: runs/NAME.")],
    arm: Annotated[str, typer.Argument(help="The arm whose adapter goes into use.")],
    seed: Annotated[
        int | None, typer.Option("--seed", help="Which seed's checkpoint; default: the first.")
    ] = None,
) -> int:
    """Put an arm's adapter into use; refused unless its verdict says PROMOTE and still holds."""
    from bem.runs import promotion

    pointer = promotion.promote(run, arm, seed)
    console = Console()
    console.print(
        f"[green]Promoted[/] {escape(arm)}: [bold]{pointer.checkpoint}[/]", soft_wrap=True
    )
    console.print(f"Pointer: {pointer.path}", soft_wrap=True)
    return 0


def _gates(path: Path | None) -> GatesConfig:
    if path is None:
        return GatesConfig()
    if not path.is_file():
        raise ConfigError(f"No gates file at {path}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of gates, found {type(values).__name__}.")
    return parse(GatesConfig, values.get("gates", values), str(path))


def _absent_costs(sides: list[Measurement]) -> list[str]:
    """Cost gates of which no file holds anything; what only one side lacks is not waived."""
    held = {
        "budget": lambda m: m.adapter_parameters or m.adapter_flops_per_token,
        "latency": lambda m: m.latency_ms,
        "memory": lambda m: m.memory_bytes,
        "kv_hit": lambda m: m.kv_hits is not None,
    }
    return [cost for cost, has in held.items() if not any(has(side) for side in sides)]


def show_decision(console: Console, verdict: Verdict) -> None:
    """One line: who, what was decided, and why."""
    name, colour = escape(verdict.candidate), COLOURS[verdict.decision]
    said = escape(wording.sentence(verdict))
    line = f"[bold]{name}[/] [{colour}]{verdict.decision}[/] {said}"
    console.print(line, soft_wrap=True, highlight=False)


def _show(console: Console, verdict: Verdict) -> None:
    show_decision(console, verdict)
    table = Table("", "check", "value", "limit", "why", box=None, pad_edge=False)
    marks = {"pass": "[green]pass[/]", "fail": "[red]fail[/]", "unknown": "[yellow]?[/]"}
    for gate in wording.gates(verdict):
        table.add_row(marks[gate.state], gate.name, gate.value, gate.limit, escape(gate.why))
    console.print(table)
    if verdict.waived:
        console.print(f"Waived: {', '.join(verdict.waived)}.", style="dim")
    console.print()
