"""How one adapter hangs together: what a forward pass needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bem.control.controller import ChunkReader
from bem.control.state import Layout


@dataclass(frozen=True, eq=False)
class Acting:
    """Who decides and what acts, for a forward pass or a cache that begins now. A cache goes on under
    what it began with, whatever happens to the adapter in the meantime."""

    controller: ChunkReader
    members: Sequence[Any]
    """Modules with a control, or what stands for them, in the order of `Wiring.members`."""
    origin: object = None
    """Of which adapter on which model: a cache of another one is not continued. None: modules that may
    change at any time."""

    @property
    def digest(self) -> str:
        """Of the weights that act."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Acting:
        return self  # a copied cache goes on under the same weights, it does not copy them


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
    """Digest of the weights of controller and members as they are now."""

    def acting(self) -> Acting:
        """What decides and acts from now on."""
        return self.controller.acting() or Acting(self.controller, self.members)

    def digest(self, acting: Acting) -> str:
        """Of the weights that act: a cache filled under others is refused."""
        return self.owner() if acting.origin is None else acting.digest

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
