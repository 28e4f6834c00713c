"""Several versions of one routed model in one pass: each row is decided and adapted by its own.

What is expensive, the frozen base, runs once for all rows; the experts of each version see its rows alone.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bem.control.controller import ChunkReader, Pooled
from bem.control.wiring import Acting
from bem.routing.pack import Pack

Parts = list[tuple[Any, Tensor]]
"""(what acts, its rows of the batch)."""


def can_mix(one: Acting, other: Acting) -> bool:
    """Do sequences under both have states of one form?"""
    if not (isinstance(one, Pack) and isinstance(other, Pack)):
        return False
    a, b = one.controller, other.controller
    forms = [
        (r.width, r.chunk_size, r.tail_width, r.conditioning, [m.control_width for m in p.members])
        for r, p in ((a, one), (b, other))
    ]
    return forms[0] == forms[1]


class MixedReader(ChunkReader):
    """Stands for the controllers of all rows."""

    routes = True

    def __init__(self, parts: Parts):
        """parts: (pack, its rows of the batch)."""
        super().__init__()
        self.parts = parts
        first: ChunkReader = parts[0][0].controller
        self.chunk_size, self.conditioning = first.chunk_size, first.conditioning
        self.width, self.tail_width = first.width, first.tail_width

    def features(self, hidden: Tensor, head_input: Tensor | None) -> Tensor:
        """Of each token, as its own router reads it."""
        parts = [
            pack.controller.features(hidden[rows], None if head_input is None else head_input[rows])
            for pack, rows in self.parts
        ]
        return self._together(parts)

    def decide(
        self,
        members: Row[Any],
        pooled: Pooled,
        turns: Tensor | None,
        conditioning: dict[str, Tensor],
        route: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Each row by its own router; see `ChunkReader.decide`."""
        parts = [
            pack.controller.decide(
                pack.members,
                _rows_of(pooled, rows),
                None if turns is None else turns[rows],
                {name: value[rows] for name, value in conditioning.items()},
                None if route is None else route[rows],
                dtype,
            )
            for pack, rows in self.parts
        ]
        return self._together(parts)

    def flops_per_chunk(self) -> int:
        """Of the dearest."""
        return max(pack.controller.flops_per_chunk() for pack, _ in self.parts)

    def _together(self, parts: Row[Tensor]) -> Tensor:
        rows = torch.cat([rows for _, rows in self.parts])
        whole = torch.cat(list(parts))
        return torch.empty_like(whole).index_copy_(0, rows, whole)


class MixedMember:
    """Stands for one site's experts of all versions."""

    def __init__(self, parts: Parts):
        """parts: (the site's experts, their rows of the batch)."""
        self.parts = [(member, rows, _run(rows)) for member, rows in parts]
        order = torch.cat([rows for _, rows in parts])
        back = order.argsort()
        self.back = None if torch.equal(order, order.sort().values) else back
        """Where the row of each place stands among the parts put one behind the other; None: there."""
        self._split: tuple[Tensor, list[Tensor]] | None = None

    def update(self, y: Tensor, x: Tensor, control: Tensor, slot: Tensor | None) -> Tensor:
        """See `Adapter.update`."""
        return self._each([m.update for m, *_ in self.parts], y, x, control, slot)

    def ready(self, dtype: torch.dtype, rows: int) -> Callable[..., Tensor]:
        """See `Adapter.ready`."""
        return partial(self._each, [m.ready(dtype, len(own)) for m, own, _ in self.parts])

    def _each(
        self, updates: Row[Callable], y: Tensor, x: Tensor, control: Tensor, slot: Tensor | None
    ) -> Tensor:
        controls = self._controls(control) if slot is None else [control] * len(self.parts)
        done = []
        for update, (_, _, at), c in zip(updates, self.parts, controls, strict=True):
            own = None if slot is None else slot.view(x.shape[:2])[at].flatten()
            done.append(update(y[at], x[at], c, own))
        together = torch.cat(done)
        return together if self.back is None else together.index_select(0, self.back)

    def _controls(self, control: Tensor) -> list[Tensor]:
        """A control of each row, split; kept while a chunk is decoded, as the experts keep what they look up."""
        if self._split is None or self._split[0] is not control:
            self._split = control, [control[at] for *_, at in self.parts]
        return self._split[1]


def mixed(packs: Row[Pack], device: torch.device) -> Acting:
    """What acts on a batch whose rows are under these packs; one of them, if it is the same for all."""
    rows_of: dict[int, list[int]] = {}
    for row, pack in enumerate(packs):
        rows_of.setdefault(id(pack), []).append(row)
    if len(rows_of) == 1:
        return packs[0]
    parts = [(packs[rows[0]], torch.tensor(rows, device=device)) for rows in rows_of.values()]
    members = [
        MixedMember([(pack.members[site], rows) for pack, rows in parts])
        for site in range(len(packs[0].members))
    ]
    return Acting(MixedReader(parts), members, packs[0].origin)


def _run(rows: Tensor) -> Tensor | slice:
    """The same rows as a slice, if they stand side by side: then nothing is copied to read them."""
    first = int(rows[0])
    is_run = rows.tolist() == list(range(first, first + len(rows)))
    return slice(first, first + len(rows)) if is_run else rows


def _rows_of(pooled: Pooled, rows: Tensor) -> Pooled:
    before = pooled.before.select(rows)
    return replace(
        pooled,
        slot=pooled.slot[rows],
        sums=pooled.sums[rows],
        count=pooled.count[rows],
        before=before,
        control=pooled.control[rows],
    )
