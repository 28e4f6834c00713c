"""One forward pass: what is known of its rows, and the control that passes from layer to layer.

A model keeps nothing between calls. A `StepContext` is built when a pass begins, handed down through
the thread that runs it, and gone when the pass ends: two threads on one model never meet. What a
sequence needs later lives with its cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int, Shaped
from torch import Tensor

from bem.control.chunks import Documents
from bem.errors import AttachError
from bem.variants.base import Update

Updates = Sequence[Update | None]
"""`Adapter.ready` of each member that has it."""


@dataclass
class Given:
    """What the caller handed to the model beside its own arguments."""

    turns: Tensor | None = None
    conditioning: dict[str, Tensor] = field(default_factory=dict)
    route: Tensor | None = None
    mask: Any = None
    """The call's own attention mask, whatever its form."""


@dataclass
class GenerateCall:
    """One `generate`: what holds for all of its forward passes."""

    prompt: int
    """Columns of the prompt."""
    turns: Tensor | None
    """Bool (rows, prompt): where turns start, the last token of each prompt included; None: taken from
    the first mask."""
    mask: Tensor | None
    """(rows, prompt): 0 at padding; None: as the forward passes say."""
    given: Given
    begun: bool = False
    cache: Any = None
    """Of its forward passes, once one has begun."""

    def runs(self, cache: Any) -> bool:
        """Is a pass through this cache one of its own? Guidance, or a logits processor of the caller's,
        runs the model on other sequences meanwhile: nothing said of the prompts holds for them."""
        if not self.begun:
            self.begun, self.cache = True, cache
        return cache is self.cache


@dataclass
class StepContext:
    """One forward pass."""

    mask: Shaped[Tensor, "batch columns"] | None
    """False at padding, for these tokens or for all of the cache; None: no padding."""
    given: Given
    generating: GenerateCall | None = None
    documents: Int[Tensor, "batch tokens"] | None = None
    """Positions, where they may tell packed documents apart."""
    packed: Documents | None = None
    acting: Any = None
    """The `Acting` of this pass; None until the router layer is entered."""
    head_input: Tensor | None = None
    """Input of the attention output projection below the router layer."""
    tables: tuple[Tensor, ...] | None = None
    """Control table (rows, width) of each member; None until the router layer is entered."""
    updates: Updates = ()
    """Of the members, looked up for a running chunk; empty: their own `update`."""
    slot: Int[Tensor, " tokens"] | None = None
    """Row of the tables of each token, in flattened order; None: one row per token."""
    shape: tuple[int, int] = (0, 0)
    """(batch, tokens)."""
    checkpointing: bool = False

    def control(self, index: int) -> tuple[Tensor, Tensor | None]:
        """(table, slot) of one member; see `decided`."""
        return (self.tables or self.decided())[index], self.slot

    def decided(self) -> tuple[Tensor, ...]:
        """The control tables of all members.

        Raises:
            AttachError: the router layer was not passed.
        """
        if self.tables is None:
            raise AttachError(
                "No control was computed: call the whole model, not a part of it above the router layer."
            )
        return self.tables

    def control_per_token(self, index: int) -> Tensor:
        """The control of one member spread over tokens (batch, tokens, width)."""
        table, slot = self.control(index)
        rows = table if slot is None else table.index_select(0, slot)
        return rows.view(*self.shape, -1)


class Ambient(threading.local):
    """What the current thread is doing with one model."""

    def __init__(self) -> None:
        self.context: StepContext | None = None
        self.given: Given | None = None  # from the model's call until its decoder is entered
        self.generating: GenerateCall | None = None
        self.last: StepContext | None = None  # the pass before: for whoever looks at it afterwards

    def current(self) -> StepContext:
        """The pass that is running.

        Raises:
            AttachError: none is.
        """
        if self.context is None:
            raise AttachError(
                "an adapted layer was reached without its decoder: call the model or its decoder as a "
                "module, `model(...)`, not `.forward(...)` or a single block."
            )
        return self.context

    @contextmanager
    def entered(self, context: StepContext) -> Iterator[None]:
        """Run with this pass as the current one: backward recomputes blocks, maybe in another thread."""
        before, self.context = self.context, context
        try:
            yield
        finally:
            self.context = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Ambient:
        return Ambient()

    def __reduce__(self) -> Any:
        return Ambient, ()
