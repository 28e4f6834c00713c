"""`bem plan`: what a wanted decision costs, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bem.config import GatesConfig, load_gates
from bem.errors import ConfigError

if TYPE_CHECKING:
    from bem.stats import Measurement
    from bem.stats.planning import Goal, Spread

SEEDS = (1, 2, 3, 5)

Gain = Annotated[float, typer.Option("--gain", help="True gain worth finding, in points.")]
Baseline = Annotated[
    Path | None, typer.Option("--baseline", help="Scores of an arm: a file, or runs/NAME/arms/ARM.")
]
Candidate = Annotated[
    Path | None, typer.Option("--candidate", help="Scores of a similar arm, likewise.")
]
MetricName = Annotated[str, typer.Option("--metric", help="Metric of these scores.")]
Score = Annotated[
    float, typer.Option("--score", help="Without files: the baseline's score, 0..100.")
]
Shared = Annotated[
    float, typer.Option("--shared", help="... share of answers that both give alike, 0..1.")
]
SeedsAlike = Annotated[
    float, typer.Option("--seeds-alike", help="... correlation of an example's gain between seeds.")
]
ClusterSize = Annotated[
    float, typer.Option("--cluster-size", help="... examples per source document.")
]
ClusterCorrelation = Annotated[
    float, typer.Option("--cluster-correlation", help="... correlation of gains within one.")
]
Slices = Annotated[
    int | None, typer.Option("--slices", min=0, help="Guarded slices; default: as in the files.")
]
Hypotheses = Annotated[
    int, typer.Option("--hypotheses", min=1, help="Candidates x primary metrics.")
]
Rows = Annotated[
    int | None, typer.Option("--rows", min=1, help="Also: what so many rows would show.")
]
Latency = Annotated[
    float, typer.Option("--latency", min=0.01, help="Expected ratio of the latencies.")
]
Noise = Annotated[
    float, typer.Option("--noise", min=0, help="Standard deviation of its log in one round.")
]
Gates = Annotated[Path | None, typer.Option("--gates", help="YAML with the gates to change.")]


def plan(
    gain: Gain, baseline: Baseline = None, candidate: Candidate = None, metric: MetricName = "em",
    score: Score = 50.0, shared: Shared = 0.7, seeds_alike: SeedsAlike = 0.5,
    cluster_size: ClusterSize = 1.0, cluster_correlation: ClusterCorrelation = 0.2,
    slices: Slices = None, hypotheses: Hypotheses = 1, rows: Rows = None,
    latency: Latency = 1.05, noise: Noise = 0.05, gates: Gates = None,
) -> int:  # fmt: skip
    """Say how many rows, seeds and timing rounds a wanted decision needs.

    How much examples vary is taken from two score files, if there are any (what `bem validate`
    reads; of two arms that differ as little as those to come), else from the assumptions. Rows count
    what is held out; slices are alike and of equal size.
    """
    from bem.stats import planning

    limits = load_gates(gates)
    if (baseline is None) != (candidate is None):
        raise ConfigError("--baseline and --candidate go together: how a pair differs is measured.")
    if baseline is not None and candidate is not None:
        old, new = _measured(baseline), _measured(candidate)
        spread = planning.measured_spread(old, new, metric)
        slices = _guarded(old, limits) if slices is None else slices
        source = f"measured on {metric} of {baseline} and {candidate}, {old.n:,} rows"
    else:
        spread = planning.assumed_spread(
            score / 100, shared, gain, seeds_alike, cluster_size, cluster_correlation
        )
        source = f"assumed: score {score:g}, {shared:.0%} of the answers shared"
    console = Console()
    console.print(
        f"An example's gain varies by {spread.per_row(1) ** 0.5:.0f} points with one seed "
        f"({escape(source)}; design effect of clusters {spread.design_effect:.2f}).",
        soft_wrap=True,
    )
    console.print(_table(planning.Goal(gain, slices or 0, hypotheses), spread, limits, rows))
    console.print(_timing(latency, noise, limits), soft_wrap=True)
    return 0


def _table(goal: Goal, spread: Spread, gates: GatesConfig, rows: int | None) -> Table:
    """Rows needed by number of seeds."""
    from bem.stats import planning
    from bem.stats.power import minimal_detectable_effect

    table = Table("", *(f"{s} seed{'s' * (s > 1)}" for s in SEEDS), box=None, pad_edge=False)
    promote = [planning.rows_to_promote(goal, spread, s, gates) for s in SEEDS]
    within = f" with {goal.slices} slices" if goal.slices else ""
    table.add_row(
        f"rows to promote {goal.gain_points:+g} points{within}",
        *("none will do" if n is None else f"{n:,}" for n in promote),
    )
    reject = [planning.rows_to_reject(spread, s, gates) for s in SEEDS]
    table.add_row("rows to reject what gains nothing", *(f"{n:,}" for n in reject))
    if rows is not None:
        chances = [planning.promote_probability(rows, goal, spread, s, gates) for s in SEEDS]
        table.add_row(f"chance of a promotion with {rows:,} rows", *(f"{p:.0%}" for p in chances))
        errors = [(spread.per_row(s) / rows) ** 0.5 for s in SEEDS]
        level = gates.alpha / goal.hypotheses
        least = [minimal_detectable_effect(se, level, gates.power) for se in errors]
        table.add_row(f"smallest gain that {rows:,} rows show", *(f"{g:.1f}" for g in least))
    return table


def _timing(ratio: float, noise: float, gates: GatesConfig) -> str:
    from bem.stats.latency import rounds_needed

    most = gates.latency_ratio_max
    if not (ratio < 1e3 and noise < 1e3):  # NaN is not either
        raise ConfigError(f"--latency {ratio:g} and --noise {noise:g} must be numbers below 1000.")
    rounds = rounds_needed(ratio, most, noise, gates.alpha, gates.power)
    limit = f"a latency of x{ratio:g} against the limit of x{most:g}"
    if rounds is None:
        return f"Timing rounds: no number decides {limit}."
    return f"Timing rounds to decide {limit}, noise {noise:.0%} a round: {rounds:,}."


def _measured(path: Path) -> Measurement:
    """A score file, or all seeds of a run's arm."""
    from bem.runs.verdicts import over_seeds
    from bem.stats import load

    if not path.is_dir():
        return load(path)
    files = sorted(path.glob("seed-*/measurement.json"))
    if not files:
        raise ConfigError(
            f"{path} holds no seed-*/measurement.json. Name a file or runs/NAME/arms/ARM."
        )
    return over_seeds(path.name, [load(file) for file in files])


def _guarded(baseline: Measurement, gates: GatesConfig) -> int:
    from bem.stats.effects import guarded_slices

    return len(guarded_slices(baseline, gates))
