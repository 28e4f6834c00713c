"""How one adapter hangs together: what a forward pass needs to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bem.control.controller import ChunkReader
from bem.control.state import Layout


@dataclass
class Wiring:
    """One adapter on one model."""

    name: str
    layer: int  # router layer
    depth: int  # decoder blocks of the model
    controller: ChunkReader
    members: list[Any]  # modules with a control, bottom to top
    films: dict[int, int]  # decoder block -> index into `members`
    shapings: dict[int, int]  # decoder block whose queries are scaled -> index into `members`
    queries: dict[int, Any] = field(default_factory=dict)  # the same blocks -> their `Queries`
    owner: Callable[[], str] = lambda: ""
    """Digest of the weights that act now: a cache filled under others is refused."""

    @property
    def widths(self) -> list[int]:
        """Control floats of each member; the controller's own tail comes last."""
        widths = [member.control_width for member in self.members]
        return [*widths, n] if (n := self.controller.tail_width) else widths

    @property
    def layout(self) -> Layout:
        """Sizes of a sequence's state."""
        applied = sum(member.control_width for member in self.members)
        known = tuple(sorted(self.controller.conditioning.items()))
        return Layout(
            self.controller.width, sum(self.widths), applied, self.controller.chunk_size, known
        )
