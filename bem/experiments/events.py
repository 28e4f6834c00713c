"""What happens while an experiment runs, as records that somebody may show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something to show while a run goes on."""

    stage: str
    """What is happening: training, measuring, timing, ..."""
    arm: str = ""
    seed: int = 0
    cell: int = 0
    """Number of the cell, from 1, of `cells`; 0: not about one cell."""
    cells: int = 0
    done: int = 0
    """Units of this stage (optimiser steps, examples, rounds) done, of `total`."""
    total: int = 0
    detail: str = ""
    final: bool = False
    """The cell or the stage has ended: worth a line of its own."""

    def at(self, stage: str, **values: Any) -> Event:
        """Another event about the same cell."""
        return replace(self, stage=stage, **values)


Show = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Shows nothing."""
