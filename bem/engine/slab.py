"""Keys and values of many sequences in arrays that are written in place: [slot, head, column, width].

A pass reads and writes chosen slots, each at its own place. The model sees a `Cache` of ordinary form,
one `SlabLayer` per block and, with an adapter that changes from chunk to chunk, a `SlotLayer` behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from bem.control.cache import ControlLayer
from bem.control.controller import Pooled, Running
from bem.control.state import ControlState
from bem.control.wiring import Wiring

GROWTH = 64
"""Columns by which an array grows at least."""


@dataclass
class Place:
    """Where one pass reads and writes."""

    slots: list[int]
    starts: list[int]
    """Column of each row's first new token."""
    tokens: list[int]
    """New tokens of each row; the piece is as wide as the largest."""
    device: torch.device

    def __post_init__(self) -> None:
        self.width = max(self.tokens)
        self.columns = max(self.starts) + self.width
        first = torch.tensor(self.starts, device=self.device)[:, None]
        self.positions = first + torch.arange(self.width, device=self.device)
        """Column of every new token (rows, width), padding included."""
        self.rows = torch.tensor(self.slots, device=self.device)
        low, n = self.slots[0], len(self.slots)
        self.run = slice(low, low + n) if self.slots == list(range(low, low + n)) else None
        """The slots, if they stand side by side: then nothing is copied to read them."""

    @property
    def even(self) -> bool:
        """Do all rows stand at one place, with as many tokens? Then the model masks by itself."""
        return len(set(self.starts)) == 1 and len(set(self.tokens)) == 1

    def mask(self) -> Tensor:
        """Bool (rows, 1, width, columns): True where a token may look."""
        columns = torch.arange(self.columns, device=self.device)
        return (columns <= self.positions[..., None])[:, None]


class SlabLayer(CacheLayerMixin):
    """Keys and values of one block, of all slots."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False
    keys: Tensor
    values: Tensor

    def __init__(self, slots: int):
        super().__init__()
        self.slots = slots
        self.room = GROWTH
        self.place: Place | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        with torch.inference_mode(False):
            self.keys, self.values = (
                torch.zeros(
                    self.slots, x.shape[1], self.room, x.shape[3], dtype=x.dtype, device=x.device
                )
                for x in (key_states, value_states)
            )
        self.is_initialized = True

    def reserve(self, columns: int) -> None:
        """Room for so many columns of every slot."""
        if columns <= self.room:
            return
        self.room = -(-max(columns, self.room + self.room // 2) // GROWTH) * GROWTH
        if self.is_initialized:
            with torch.inference_mode(False):
                self.keys, self.values = (_grown(x, self.room) for x in (self.keys, self.values))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.place is not None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self.place
        at = (place.rows[:, None], slice(None), place.positions)
        self.keys[at] = key_states.transpose(1, 2)
        self.values[at] = value_states.transpose(1, 2)
        return self._seen(self.keys), self._seen(self.values)

    def _seen(self, array: Tensor) -> Tensor:
        assert self.place is not None
        filled = array[:, :, : self.place.columns]
        return (
            filled.index_select(0, self.place.rows)
            if self.place.run is None
            else filled[self.place.run]
        )

    # --- what a Cache asks of its layers ----------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.place.starts[0] if self.place is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.columns if self.place is not None else query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class SlotLayer(ControlLayer):
    """The control of chosen slots of one state: `ControlLayer` for rows that stand at different places."""

    ragged = True

    def __init__(self, wiring: Wiring, slots: int, device: torch.device):
        super().__init__(wiring, "")
        self.state: ControlState = ControlState(self.layout, slots, device)
        self.wiring = wiring
        self.filled = [0] * slots
        """Tokens in the running chunk of each slot, as counted on the host."""
        self.place: Place | None = None
        self._rows: list[int] = []

    def begins(self, place: Place, slots: Sequence[int], acting: Any) -> None:
        """The next pass: where it writes, of which control slots, and under what."""
        if self._rows != list(slots) or self.acting is not acting:
            self.tables, self.updates = None, ()
        self.place, self._rows, self.acting = place, list(slots), acting

    def look_again(self) -> None:
        """A slot's control was changed outside of a pass."""
        self.tables = None

    @property
    def columns(self) -> int:
        return self.state.columns[self._rows[0]] if self._rows else 0

    @property
    def slots(self) -> list[int]:  # type: ignore[override]
        return self._rows

    def goes_on(self, wiring: Wiring) -> bool:
        """The engine says under what each sequence goes on; see `acting`."""
        return wiring is self.wiring

    def before(self, batch: int, device: torch.device) -> Running:
        return self.state.before(self._rows)

    def append(self, pooled: Pooled, features: Tensor, valid: Tensor, begun: int) -> None:
        self.state.append(self._rows, pooled, features, valid, begun)
        assert self.place is not None
        padding = [self.place.width - tokens for tokens in self.place.tokens]
        self.state.drop_padding(self._rows, padding)
        self.tables = None

    def append_token(self, features: Tensor) -> None:
        self.state.append_token(self._rows, features)

    def real(self, tokens: int) -> Tensor:
        assert self.place is not None
        counts = torch.tensor(self.place.tokens, device=self.state.device)[:, None]
        return torch.arange(tokens, device=self.state.device) < counts

    def stays(self) -> bool:
        return max(self.filled[s] for s in self._rows) < self.layout.chunk_size

    def running(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Any]:
        assert self.acting is not None
        if self.tables is None or self.tables[0].dtype != dtype:
            rows = torch.tensor(self._rows, device=self.state.device)
            control = self.state.running.control.index_select(0, rows).to(dtype)
            self.tables = control.split(self.widths, -1)
            self.updates = [
                m.ready(dtype, len(rows)) if hasattr(m, "ready") else None
                for m in self.acting.members
            ]
        return self.tables, self.updates

    def known(self, name: str) -> Tensor:
        rows = torch.tensor(self._rows, device=self.state.device)
        return self.state.conditioning[name].index_select(0, rows)

    def tell(self, name: str, value: Tensor) -> None:
        """Said once, when the sequence began."""


class Slab:
    """The cache of a model, for `slots` sequences."""

    def __init__(self, blocks: int, slots: int):
        self.layers = [SlabLayer(slots) for _ in range(blocks)]
        self.slots = slots

    def begin_like(self, other: Slab) -> None:
        """Make arrays for the layers that `other` has them for: a store that others fill may hold what this
        one is to read before it was ever written to."""
        for layer, known in zip(self.layers, other.layers, strict=True):
            if known.is_initialized:
                layer.lazy_initialization(known.keys, known.values)

    def cache(self, place: Place, control: SlotLayer | None) -> Cache:
        """For one pass; room is made for what it writes."""
        for layer in self.layers:
            layer.reserve(place.columns)
            layer.place = place
        return Cache(layers=[*self.layers, *([] if control is None else [control])])

    def take(self, slot: int, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) of these columns, copied, of each block [head, columns, width]."""
        return [
            (layer.keys[slot, :, start:stop].clone(), layer.values[slot, :, start:stop].clone())
            for layer in self._used
        ]

    def put(self, slot: int, start: int, stop: int, held: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Write what `take` gave, into the columns from `start` to `stop`."""
        for layer, (keys, values) in zip(self._used, held, strict=True):
            layer.reserve(stop)
            layer.keys[slot, :, start:stop] = keys
            layer.values[slot, :, start:stop] = values

    def move(self, source: int, target: int, columns: int) -> None:
        """Copy one slot's first columns into another."""
        for layer in self._used:
            for array in (layer.keys, layer.values):
                array[target, :, :columns] = array[source, :, :columns]

    @property
    def _used(self) -> list[SlabLayer]:
        """Of the blocks that keep keys and values, once one pass was made: some use those of others."""
        return [layer for layer in self.layers if layer.is_initialized]

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._used)


def _grown(array: Tensor, room: int) -> Tensor:
    shape = list(array.shape)
    shape[2] = room
    grown = array.new_zeros(shape)
    grown[:, :, : array.shape[2]] = array
    return grown
