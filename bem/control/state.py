"""What BEM remembers of sequences, many at a time: arrays [slot, ...], a sequence owns one slot.

A slot holds the running chunk (sums, counts, its control), what is known of the sequence beside its
tokens, one row of history per finished chunk, and the features of the newest tokens alone. So memory
grows by a chunk's control and sums every `chunk_size` tokens, and not by the features of each token.

Nothing here reads back from the device while tokens are appended: columns and bounds are counted on
the host. Past control is never revised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bem.control.controller import Pooled, Running
from bem.errors import CacheError

# Newest tokens whose features are kept, so that a crop can end inside a chunk: of a first piece, which is read at
# the moment when a pass needs the most memory and is rarely cropped, and in all.
FIRST_FEATURES, KEPT_FEATURES = 32, 128
FIRST_CHUNKS, FIRST_COLUMNS = 4, 256  # room of a new array


@dataclass(frozen=True)
class Layout:
    """Sizes of one adapter's state."""

    features: int
    """Pooled numbers per token."""
    width: int
    """Control floats per chunk, the controller's tail included."""
    applied: int
    """How many of them act on the model; the rest is the controller's memory."""
    chunk_size: int
    conditioning: tuple[tuple[str, int], ...] = ()
    """(name, width) of what may be known beside the tokens."""


class ControlState:
    """The control of many sequences.

    slot = state.begin()                  a new sequence
    state.append([slot], pooled, ...)     a piece of it was read
    other = state.fork(slot)              a second one that goes on from there
    state.crop([slot], keep)              forget its newest tokens
    state.free(slot)                      its slot may be used again
    """

    def __init__(self, layout: Layout, slots: int, device: torch.device | str = "cpu"):
        self.layout, self.device = layout, torch.device(device)
        self.columns = [0] * slots  # tokens of each sequence, padding included
        self.turns = [0] * slots  # most turn starts in each
        self.oldest = [0] * slots  # first column of each whose features are kept
        self._free = list(range(slots - 1, -1, -1))
        with torch.inference_mode(False):  # inference tensors could not be written to outside of it
            self._allocate(slots)

    def _allocate(self, slots: int) -> None:
        f, w = self.layout.features, self.layout.width
        float64 = {"dtype": torch.float64, "device": self.device}
        whole = {"dtype": torch.long, "device": self.device}
        self.running = Running(
            sums=torch.zeros(slots, f, **float64),
            count=torch.zeros(slots, **whole),
            done_sums=torch.zeros(slots, f, **float64),
            done_count=torch.zeros(slots, **whole),
            number=torch.zeros(slots, **whole),
            control=torch.zeros(slots, w, device=self.device),
        )
        self.conditioning = {
            name: torch.zeros(slots, width, device=self.device)
            for name, width in self.layout.conditioning
        }
        # one row per chunk number (0: before the first token), and a last one for what is no chunk
        chunks = FIRST_CHUNKS + 1
        self.starts = torch.zeros(slots, chunks, **whole)
        self.chunk_sums = torch.zeros(slots, chunks, f, **float64)  # of all chunks before this one
        self.controls = torch.zeros(slots, chunks, w, device=self.device)
        self.valid = torch.ones(slots, FIRST_COLUMNS, dtype=torch.bool, device=self.device)
        self.recent = torch.zeros(slots, FIRST_FEATURES, f, device=self.device)

    # --- sequences --------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.columns)

    def begin(self) -> int:
        """The slot of a new, empty sequence.

        Raises:
            CacheError: every slot is taken.
        """
        if not self._free:
            raise CacheError(
                f"all {len(self)} sequences are taken: free one, or make room for more."
            )
        slot = self._free.pop()
        self._clear(slot)
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back."""
        if slot in self._free:
            raise CacheError(f"slot {slot} is free already.")
        self._free.append(slot)

    def fork(self, slot: int) -> int:
        """The slot of a copy of a sequence; both go on from here on their own."""
        twin = self.begin()
        for array in self._arrays():
            array[twin] = array[slot]
        for counted in (self.columns, self.turns, self.oldest):
            counted[twin] = counted[slot]
        return twin

    def _clear(self, slot: int) -> None:
        for array in self._arrays():
            array[slot] = 1 if array is self.valid else 0
        self.columns[slot] = self.turns[slot] = self.oldest[slot] = 0

    def select(self, rows: Int[Tensor, " n"]) -> ControlState:
        """A new state whose slots are these slots of this one: kept, repeated or reordered."""
        other = ControlState.__new__(ControlState)
        other.layout, other.device = self.layout, self.device
        rows, host = rows.to(self.device), rows.tolist()
        other.columns = [self.columns[r] for r in host]
        other.turns = [self.turns[r] for r in host]
        other.oldest = [self.oldest[r] for r in host]
        other._free = []
        other.running = self.running.select(rows)
        other.conditioning = {n: v.index_select(0, rows) for n, v in self.conditioning.items()}
        for name in ("starts", "chunk_sums", "controls", "valid", "recent"):
            setattr(other, name, getattr(self, name).index_select(0, rows))
        return other

    def _arrays(self) -> list[Tensor]:
        running = self.running
        return [
            *(running.sums, running.count, running.done_sums, running.done_count),
            *(running.number, running.control, *self.conditioning.values()),
            *(self.starts, self.chunk_sums, self.controls, self.valid, self.recent),
        ]

    # --- reading a piece --------------------------------------------------------------------------

    def before(self, slots: Sequence[int]) -> Running:
        """The state from which a piece of these sequences is read."""
        if self._is_all(slots):
            return self.running.map(lambda t: t.clone())
        return self.running.select(self._index(slots))

    def append(
        self,
        slots: Sequence[int],
        pooled: Pooled,
        features: Float[Tensor, "batch tokens features"],
        valid: Bool[Tensor, "batch tokens"],
        begun: int,
    ) -> None:
        """Take over a piece that was read and decided.

        Args:
            slots: of the sequences, in the order of the batch.
            pooled: with its controls, made from `before(slots)`.
            features: float32, of each token.
            begun: most chunks that can have begun in the piece.
        """
        tokens = features.shape[1]
        rows = self._index(slots)
        starts = torch.tensor([self.columns[s] for s in slots], device=self.device)
        room, size = self._remember(slots, tokens), self.layout.chunk_size
        for slot in slots:
            self.turns[slot] += begun - -(-tokens // size)
        self.make_room(slots)
        self._write_history(rows, starts, pooled)
        at = starts[:, None] + torch.arange(tokens, device=self.device)
        self.valid[rows[:, None], at] = valid
        newest = features[:, -room:] * valid[:, -room:, None]
        self.recent[rows[:, None], at[:, -room:] % room] = newest
        after = pooled.after()
        for name, array in vars(self.running).items():
            array[rows] = getattr(after, name).detach().to(array.dtype)

    def _write_history(self, rows: Tensor, starts: Tensor, pooled: Pooled) -> None:
        """A row for every chunk that begins here; a slot without tokens goes to the last row."""
        real = pooled.count[:, 1:] > 0
        chunk = torch.where(real, pooled.number[:, 1:], self.starts.shape[1] - 1)
        at = (rows[:, None].expand_as(chunk), chunk)
        self.starts[at] = starts[:, None] + pooled.first_tokens
        past = pooled.before.done_sums[:, None] + pooled.sums.cumsum(1)
        self.chunk_sums[at] = past[:, :-1]
        self.controls[at] = pooled.control[:, 1:].detach().to(self.controls.dtype)

    def append_token(
        self, slots: Sequence[int], features: Float[Tensor, "batch 1 features"]
    ) -> None:
        """A decoded token of each sequence, inside its running chunk."""
        place, running = {self.columns[s] for s in slots}, self.running
        room = self._remember(slots, 1)
        if self._is_all(slots) and len(place) == 1:  # the usual batch: no index is needed
            running.sums.add_(features[:, 0])
            running.count.add_(1)
            self.recent.select(1, place.pop() % room).copy_(features[:, 0])
        else:
            rows = self._index(slots)
            at = torch.tensor([self.columns[s] - 1 for s in slots], device=self.device) % room
            running.sums.index_add_(0, rows, features[:, 0].double())
            running.count.index_add_(0, rows, torch.ones_like(rows))
            self.recent[rows, at] = features[:, 0]
        self.make_room(slots)

    def _remember(self, slots: Sequence[int], tokens: int) -> int:
        """Count so many more tokens of each; returns of how many of them features are kept."""
        room = self.recent.shape[1]
        begun = (s for s in slots if self.columns[s])  # of a first piece only the end is kept
        if room < KEPT_FEATURES and any(self._held(s) + tokens > room for s in begun):
            self._keep_more()
            room = KEPT_FEATURES
        for slot in slots:
            self.columns[slot] += tokens
            self.oldest[slot] = max(self.oldest[slot], self.columns[slot] - room)
        return room

    def _held(self, slot: int) -> int:
        """Newest columns of a sequence whose features are kept."""
        return self.columns[slot] - self.oldest[slot]

    def _keep_more(self) -> None:
        """Put what is kept where it belongs among `KEPT_FEATURES`."""
        room = self.recent.shape[1]
        last = torch.tensor(self.columns, device=self.device)[:, None]
        at = last - 1 - torch.arange(room, device=self.device)
        rows = torch.arange(len(self), device=self.device)[:, None]
        with torch.inference_mode(False):
            more = torch.zeros(len(self), KEPT_FEATURES, self.layout.features, device=self.device)
        more[rows, at % KEPT_FEATURES] = self.recent[rows, at % room]
        self.recent = more

    def make_room(self, slots: Sequence[int]) -> None:
        """Enlarge what is too small. The last row of the history is no chunk's."""
        columns = max(self.columns[s] for s in slots)
        size = self.layout.chunk_size
        chunks = max(self.turns[s] - (-self.columns[s] // size) for s in slots)
        if columns > self.valid.shape[1]:
            with torch.inference_mode(False):
                self.valid = _grown(self.valid, 2 * columns, fill=True)
        if chunks + 2 > self.starts.shape[1]:  # by a quarter: a row is as wide as all controls
            with torch.inference_mode(False):
                for name in ("starts", "chunk_sums", "controls"):
                    setattr(self, name, _grown(getattr(self, name), chunks + 2 + chunks // 4))

    def drop_padding(self, slots: Sequence[int], padding: Sequence[int]) -> None:
        """The last piece of each ended with so many columns of padding: forget them.

        A crop inside the running chunk is refused from here on: what stands there is not kept in order.
        """
        for slot, columns in zip(slots, padding, strict=True):
            if columns:
                self.columns[slot] -= columns
                self.oldest[slot] = self.columns[slot]
                self.valid[slot, self.columns[slot] :] = True

    # --- forgetting -------------------------------------------------------------------------------

    def crop(self, slots: Sequence[int], keep: int) -> None:
        """Forget all but the first `keep` columns of each sequence.

        Raises:
            CacheError: the cut lies inside a chunk whose features are no longer kept.
        """
        rows, oldest = self._index(slots), max(self.oldest[s] for s in slots)
        chunk = self._chunk_of(rows, keep - 1)
        ends = self._ends(rows, chunk)
        if oldest > keep and bool((ends > keep).any()):
            raise CacheError(
                f"cannot crop to {keep} tokens: that lies inside a chunk, and features are kept from token {oldest} "
                f"on (the newest {FIRST_FEATURES} of what was read first, later {KEPT_FEATURES}). Crop to a chunk "
                f"boundary (row 0: {self.boundaries(slots[0])}) or less far."
            )
        state = self._at(rows, keep, chunk, self._features_between(rows, keep, ends))
        for name, array in vars(self.running).items():
            array[rows] = getattr(state, name)
        self.valid[rows, keep:] = True
        for slot in slots:
            self.columns[slot] = keep

    def _features_between(self, rows: Tensor, keep: int, ends: Tensor) -> Tensor:
        """Sum of the newest features from column `keep` to the end of a chunk (rows, features)."""
        columns, room = self.columns[int(rows[0])], self.recent.shape[1]
        at = torch.arange(max(0, columns - room), columns, device=self.device)
        cut = (at >= keep) & (at[None] < ends[:, None])
        cut = (cut & self.valid[rows][:, at])[..., None]
        return (self.recent[rows][:, at % room] * cut).sum(1, dtype=torch.float64)

    def _at(self, rows: Tensor, keep: int, chunk: Tensor, gone: Tensor) -> Running:
        """What was running when column `keep` was the next one."""
        done = self.chunk_sums[rows, chunk]
        is_last = (chunk == self.running.number[rows])[:, None]
        following = self.chunk_sums[rows, chunk + 1]
        total = torch.where(is_last, self.running.sums[rows], following - done)
        held = self.valid[rows][:, :keep]
        at = torch.arange(keep, device=self.device)
        inside = at[None] >= self.starts[rows, chunk][:, None]
        return Running(
            sums=total - gone,
            count=(held & inside).sum(1),
            done_sums=done,
            done_count=(held & ~inside).sum(1),
            number=chunk,
            control=self.controls[rows, chunk],
        )

    def _chunk_of(self, rows: Tensor, column: int) -> Tensor:
        """Chunk number of a column of each sequence."""
        chunks = torch.arange(self.starts.shape[1], device=self.device)
        begun = (chunks > 0) & (chunks[None] <= self.running.number[rows][:, None])
        return (begun & (self.starts[rows] <= column)).sum(1)

    def _ends(self, rows: Tensor, chunk: Tensor) -> Tensor:
        """Column behind the last one of a chunk of each sequence (padding behind it included)."""
        columns = torch.tensor([self.columns[r] for r in rows.tolist()], device=self.device)
        following = self.starts[rows, chunk + 1]
        return torch.where(chunk < self.running.number[rows], following, columns)

    # --- looking ----------------------------------------------------------------------------------

    def numbers(self, slots: Sequence[int]) -> Int[Tensor, "batch columns"]:
        """Chunk number of every column; 0 before the first token."""
        rows, columns = self._index(slots), self.columns[slots[0]]
        last = int(self.running.number[rows].max())
        begun = torch.arange(1, last + 1, device=self.device)
        real = begun[None] <= self.running.number[rows][:, None]
        starts = torch.where(real, self.starts[rows][:, 1 : last + 1], columns)
        at = torch.arange(columns, device=self.device)
        return torch.searchsorted(
            starts.contiguous(), at.expand(len(rows), -1).contiguous(), right=True
        )

    def history(self, slots: Sequence[int]) -> Float[Tensor, "batch chunks width"]:
        """Control of every chunk, the controller's tail included; chunk 0 stands before the first token."""
        rows = self._index(slots)
        return self.controls[rows][:, : int(self.running.number[rows].max()) + 1]

    def boundaries(self, slot: int) -> list[int]:
        """Columns at which the chunks of a sequence begin, the first one left out."""
        return self.starts[slot, 2 : int(self.running.number[slot]) + 1].tolist()

    def _index(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor(list(slots), device=self.device)

    def _is_all(self, slots: Sequence[int]) -> bool:
        return len(slots) == len(self) and all(i == s for i, s in enumerate(slots))


def _grown(array: Tensor, room: int, fill: bool = False) -> Tensor:
    """A copy with so much room along dimension 1."""
    shape = list(array.shape)
    shape[1] = room
    grown = array.new_full(shape, 1) if fill else array.new_zeros(shape)
    grown[:, : array.shape[1]] = array
    return grown
