"""`bem run`, `train`, `evaluate`, `report`: the commands that need a model."""

from __future__ import annotations

import os
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from bem import config as configuration
from bem.cli.verdict import show_decision

if TYPE_CHECKING:
    from bem.experiments.runner import Event

ConfigFile = Annotated[Path, typer.Argument(help="Experiment as YAML; see configs/.")]
DataFolder = Annotated[
    str | None, typer.Option("--data", help="Folder of public sets; default: the embedded suite.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value: --set training.steps=50."),
]
Base = Annotated[
    str | None, typer.Option("--base", help="bem-tiny, a folder or a Hugging Face id.")
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the run (its folder).")]
Output = Annotated[str | None, typer.Option("--output", help="Folder that holds all runs.")]


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
    experiment = _load(config, data, settings, base, name, output)
    from bem.experiments import runner

    console = Console()
    _quiet()
    with _Display(console) as display:
        result = runner.run(experiment, display.show, command=_command())
    for verdict in result.verdicts.values():
        show_decision(console, verdict)
    console.print(f"\nReport: [bold]{result.report}[/]", soft_wrap=True)
    return 0


def train(
    config: ConfigFile,
    arm: Annotated[str, typer.Option("--arm", help="Which arm of the config.")],
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights and data order.")] = 0,
    data: DataFolder = None,
    settings: Settings = None,
    base: Base = None,
    name: Name = None,
    output: Output = None,
) -> int:
    """Train one arm with one seed; `bem run` takes it over as it is."""
    experiment = _load(config, data, settings, base, name, output)
    from bem.experiments import runner

    console = Console()
    _quiet()
    with _Display(console) as display:
        checkpoint = runner.train(experiment, arm, seed, display.show, command=_command())
    console.print(f"Checkpoint: [bold]{checkpoint}[/]", soft_wrap=True)
    return 0


def evaluate(
    config: ConfigFile,
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an adapter's checkpoint.")],
    data: DataFolder = None,
    settings: Settings = None,
    base: Base = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the scores here, for `bem validate`.")
    ] = None,
) -> int:
    """Measure one checkpoint on the held-out rows of a config's tasks."""
    experiment = _load(config, data, settings, base, None, None)
    import numpy as np

    from bem.experiments import runner
    from bem.stats import save

    console = Console()
    _quiet()
    with _Display(console) as display:
        measurement = runner.evaluate(experiment, checkpoint, display.show)
    table = Table("metric", "mean", "examples", box=None)
    for metric, scores in measurement.metrics.items():
        table.add_row(metric, f"{np.asarray(scores).mean():.4g}", str(measurement.n))
    console.print(table)
    if out:
        save(measurement, out)
        console.print(f"Scores: [bold]{out}[/]", soft_wrap=True)
    return 0


def report(run: Annotated[Path, typer.Argument(help="Folder of a run: runs/NAME.")]) -> int:
    """Write report.html and report.md of a finished run again."""
    from bem.experiments import report as reports

    Console().print(f"Report: [bold]{reports.write(run)}[/]", soft_wrap=True)
    return 0


def _load(
    path: Path,
    data: str | None,
    settings: list[str] | None,
    base: str | None,
    name: str | None,
    output: str | None,
) -> configuration.ExperimentConfig:
    """The config with the options of the command line applied as overrides."""
    given = {"data.root": data, "base": base, "name": name, "output": output}
    options = [f"{key}={_yaml(value)}" for key, value in given.items() if value is not None]
    return configuration.load(path, [*(settings or []), *options])


def _yaml(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _command() -> str:
    return shlex.join(["bem", *sys.argv[1:]])


def _quiet() -> None:
    """No bars for loading a few megabytes, and no news about other libraries' next versions.

    The environment carries the filter to the processes that train.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:transformers.modeling_utils")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


class _Display:
    """Shows the events of a run: a bar per cell at work on a terminal, now and then a line elsewhere."""

    SECONDS_BETWEEN_LINES = 15.0

    def __init__(self, console: Console):
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self.bars: dict[tuple[str, int], TaskID] = {}
        self.stages: dict[tuple[str, int], str] = {}
        self.last_line: dict[tuple[str, int], float] = {}

    def __enter__(self) -> _Display:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def show(self, event: Event) -> None:
        cell = (event.arm, event.seed)
        where = (
            f"[{event.cell}/{event.cells}] {event.arm} seed {event.seed}: " if event.cell else ""
        )
        stage = where + event.stage
        if stage != self.stages.get(cell):
            self.stages[cell], self.last_line[cell] = stage, 0.0
            self._drop(cell)
        if self.console.is_terminal and not event.final:
            self._move(cell, stage, event)
        if event.final or not self.console.is_terminal:
            self._line(cell, stage, event)

    def _move(self, cell: tuple[str, int], stage: str, event: Event) -> None:
        if cell not in self.bars:
            self.bars[cell] = self.progress.add_task(stage, total=event.total or None, detail="")
        self.progress.update(
            self.bars[cell],
            description=escape(stage),
            completed=event.done,
            total=event.total or None,
            detail=escape(event.detail),
        )

    def _line(self, cell: tuple[str, int], stage: str, event: Event) -> None:
        now = time.monotonic()
        if not event.final and now - self.last_line[cell] < self.SECONDS_BETWEEN_LINES:
            return
        self.last_line[cell] = now
        share = f" {event.done}/{event.total}" if event.total and not event.final else ""
        line = f"{stage}{share} {event.detail}".rstrip()
        self.console.print(escape(line), soft_wrap=True, highlight=False)

    def _drop(self, cell: tuple[str, int]) -> None:
        for gone in {cell, ("", 0)} & self.bars.keys():  # a stage of the whole run has ended too
            self.progress.remove_task(self.bars.pop(gone))
