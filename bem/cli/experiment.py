"""`bem run`, `train`, `evaluate`, `report`: the commands that need a model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bem.cli.conversation import show_routed
from bem.cli.display import Display, quiet
from bem.cli.options import Base, ConfigFile, DataFolder, Name, Output, Settings, command, load
from bem.cli.verdict import show_decision
from bem.errors import CheckpointError
from bem.files import read_json
from bem.report import words

train_app = typer.Typer(help="Train one arm of a config, or its router.", no_args_is_help=True)


def run(
    config: ConfigFile,
    data: DataFolder = None,
    settings: Settings = None,
    base: Base = None,
    name: Name = None,
    output: Output = None,
) -> int:
    """Train, measure and judge every arm of an experiment, and write its report.

    What is finished is skipped, what was interrupted is resumed: the same command again.
    """
    experiment = load(config, data, settings, base, name, output)
    from bem.experiments import run as runner

    console = Console()
    quiet()
    with Display(console) as display:
        result = runner.run(experiment, display.show, command=command())
    for verdict in result.verdicts.values():
        show_decision(console, verdict)
    if changes := words.gate_changes(experiment.gates):
        console.print(f"Gates other than the defaults: {escape(changes)}.", highlight=False)
    show_routed(console, result.folder, experiment)
    console.print(f"\nReport: [bold]{result.report}[/]", soft_wrap=True)
    return 0


class Stage(StrEnum):
    """Up to which router to go."""

    AR0 = "ar0"
    AR1 = "ar1"


Seed = Annotated[
    int | None, typer.Option("--seed", help="One of the config's seeds; default: its first.")
]


@train_app.command("arm")
def train_arm(
    config: ConfigFile,
    arm: Annotated[str, typer.Option("--arm", help="Which arm of the config.")],
    seed: Seed = None,
    data: DataFolder = None,
    settings: Settings = None,
    base: Base = None,
    name: Name = None,
    output: Output = None,
) -> int:
    """Train and measure one arm with one seed; `bem run` takes it over as it is."""
    experiment = load(config, data, settings, base, name, output)
    from bem.experiments import run as runner

    console, number = Console(), experiment.seeds[0] if seed is None else seed
    quiet()
    with Display(console) as display:
        checkpoint = runner.train(experiment, arm, number, display.show, command=command())
    console.print(f"Checkpoint: [bold]{escape(str(checkpoint))}[/]", soft_wrap=True)
    return 0


@train_app.command("router")
def train_router(
    config: ConfigFile,
    seed: Seed = None,
    stage: Annotated[
        Stage, typer.Option("--stage", help="ar0: cloned from the oracle; ar1: then improved.")
    ] = Stage.AR1,
    data: DataFolder = None,
    settings: Settings = None,
    base: Base = None,
    name: Name = None,
    output: Output = None,
) -> int:
    """Train the experts and the router of one seed; `bem run` takes them over as they are."""
    experiment = load(config, data, settings, base, name, output)
    from bem.experiments import run as runner

    console, number = Console(), experiment.seeds[0] if seed is None else seed
    quiet()
    with Display(console, in_full={"policy gradient"}) as display:
        folder = runner.train_router(experiment, number, stage, display.show, command())
    _show_accuracy(console, folder.parent / "cloning.json")
    path = escape(str(folder))
    console.print(f"\nRouter: [bold]{path}[/]", soft_wrap=True)
    also = "" if experiment.base == "bem-tiny" else f" --base {escape(experiment.base)}"
    ask = f"bem route explain TEXT --router {path}{also}"
    console.print(f"Ask it: {ask}", soft_wrap=True, highlight=False)
    return 0


def _show_accuracy(console: Console, cloning: Path) -> None:
    """How well the cloned router repeats the oracle on conversations held out from its training."""
    result = read_json(cloning, CheckpointError)
    console.print(
        f"\nCloned from {result['decisions']:,} decisions of the oracle; on held-out ones it agrees:",
        highlight=False,
    )
    table = Table("head", "accuracy", "chance", "majority", "decisions", box=None, pad_edge=False)
    for head in result["accuracy"]:
        shares = (f"{head[key]:.1%}" for key in ("accuracy", "chance", "majority"))
        table.add_row(head["head"], *shares, f"{head['decisions']:,}")
    console.print(table)


def evaluate(
    config: ConfigFile,
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an adapter's checkpoint.")],
    data: DataFolder = None,
    settings: Settings = None,
    base: Base = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Write the scores here, for `bem validate`: .json with costs; .csv, .tsv, .jsonl alone.",
        ),
    ] = None,
) -> int:
    """Measure one checkpoint on the held-out rows of a config's tasks."""
    experiment = load(config, data, settings, base)
    import numpy as np

    from bem.experiments import run as runner
    from bem.stats import save
    from bem.stats.files import kind_of

    kind = kind_of(out) if out else None  # a name that cannot be written is known before measuring
    console = Console()
    quiet()
    with Display(console) as display:
        measurement = runner.evaluate(experiment, checkpoint, display.show)
    table = Table("metric", "mean", "examples", box=None)
    for metric, scores in measurement.metrics.items():
        table.add_row(metric, f"{np.asarray(scores).mean():.4g}", str(measurement.n))
    console.print(table)
    if out:
        save(measurement, out)
        console.print(f"Scores: [bold]{escape(str(out))}[/]", soft_wrap=True)
        if kind != "json":
            console.print("Scores alone: parameters, FLOPs, cache hits and routes need .json.")
    return 0


def report(run: Annotated[Path, typer.Argument(help="Folder of a run: runs/NAME.")]) -> int:
    """Write report.html and report.md of a finished run again."""
    from bem.report import page as reports

    Console().print(f"Report: [bold]{reports.write(run)}[/]", soft_wrap=True)
    return 0
