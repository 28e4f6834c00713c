"""What happens, shown as it happens: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Collection

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

from bem.experiments.events import Event


def quiet() -> None:
    """No bars for loading a few megabytes, and no news about other libraries' next versions.

    The environment carries the filter to the processes that train.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:transformers.modeling_utils")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


class Display:
    """Shows the events of a run: a bar per cell at work on a terminal, now and then a line elsewhere."""

    SECONDS_BETWEEN_LINES = 15.0

    def __init__(self, console: Console, in_full: Collection[str] = ()):
        """in_full: stages of which every event is worth a line."""
        self.console, self.in_full = console, in_full
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

    def __enter__(self) -> Display:
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
        if event.final or event.stage in self.in_full or not self.console.is_terminal:
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
        due = now - self.last_line[cell] >= self.SECONDS_BETWEEN_LINES
        if not (due or event.final or event.stage in self.in_full):
            return
        self.last_line[cell] = now
        share = f" {event.done}/{event.total}" if event.total and not event.final else ""
        line = f"{stage}{share} {event.detail}".rstrip()
        self.console.print(escape(line), soft_wrap=True, highlight=False)

    def _drop(self, cell: tuple[str, int]) -> None:
        for gone in {cell, ("", 0)} & self.bars.keys():  # a stage of the whole run has ended too
            self.progress.remove_task(self.bars.pop(gone))
