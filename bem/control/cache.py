"""Control lives with the KV cache: a layer of the `Cache`, behind the layers of keys and values.

So it survives whatever happens to the cache: beam reordering, batch selection, cropping, copying,
reuse of a prefix. Past control is never revised; this layer only remembers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from bem.control.controller import Routed, Running
from bem.errors import CacheError

if TYPE_CHECKING:
    from bem.control.runtime import Wiring

KEPT_FEATURES = 128  # newest tokens whose features are kept, so that a crop can end inside a chunk


@dataclass(frozen=True)
class Piece:
    """What one forward pass added."""

    number: Tensor  # int (batch, tokens): chunk of each column
    slot_number: Tensor  # int (batch, slots): chunk of each slot
    slot_sums: Tensor  # (batch, slots, features)
    slot_control: Tensor  # (batch, slots, width)
    features: Tensor  # (batch, tokens or the last KEPT_FEATURES, features), zero at padding
    valid: Tensor  # bool (batch, tokens)

    def select(self, rows: Tensor) -> Piece:
        """Keep, repeat or reorder sequences."""
        return Piece(**{k: v.index_select(0, rows.to(v.device)) for k, v in vars(self).items()})


class ControlLayer(CacheLayerMixin):
    """Running state, and the applied control of every chunk, of one adapter."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    is_sliding = False

    def __init__(self, owner: str, applied_width: int | None = None):
        """owner: name of the adapter whose control this is; applied_width: control floats that act on
        the model, the rest is the controller's memory."""
        super().__init__()
        self.owner, self.applied_width = owner, applied_width
        self.is_initialized = True  # nothing is allocated up front
        self._clear()

    def _clear(self) -> None:
        self.columns = 0
        self.running: Running | None = None
        self.parts: tuple[Tensor, ...] | None = None  # control of the running chunk, per adapter
        self.left: int | None = (
            None  # tokens that surely still fit the running chunks; None: unknown
        )
        self._pieces: list[Piece] = []
        self._pending: list[Tensor] = []  # features of decoded tokens, not yet summed

    def append(self, routed: Routed, features: Tensor, valid: Tensor) -> None:
        """Take over the result of a forward pass over one piece."""
        self.running = routed.after()
        self.parts, self.left = None, None
        self.columns += features.shape[1]
        masked = features[:, -KEPT_FEATURES:] * valid[:, -KEPT_FEATURES:, None]
        number = routed.before.number[:, None] + routed.slot
        self._pieces.append(
            Piece(number, routed.number, routed.sums, routed.control, masked, valid)
        )

    def append_token(self, features: Tensor) -> None:
        """A decoded token inside its chunk; summed only when the next chunk needs it."""
        assert self.left is not None
        self._pending.append(features)
        self.columns += 1
        self.left -= 1

    def settle(self) -> Running | None:
        """Sum what was decoded since the last chunk began, and return the state."""
        if self._pending and self.running is not None:
            features, self._pending = torch.cat(self._pending, 1), []
            run, tokens = self.running, features.shape[1]
            sums = run.sums + features.sum(1)
            self.running = Running(
                sums, run.count + tokens, run.done_sums, run.done_count, run.number, run.control
            )
            number = run.number[:, None]
            valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
            self._pieces.append(
                Piece(
                    number.expand(-1, tokens),
                    number,
                    sums[:, None],
                    run.control[:, None],
                    features,
                    valid,
                )
            )
        return self.running

    def applied(self) -> tuple[Tensor, Tensor]:
        """Chunk number of every column (batch, columns), and what acted on the model in every chunk
        (batch, chunks, applied width)."""
        self.settle()
        number, _, controls, _ = self._history()
        return number, controls[..., : self.applied_width]

    def memory(self) -> tuple[Tensor, Tensor]:
        """Chunk number of every column, and the controller's own tail in every chunk."""
        self.settle()
        number, _, controls, _ = self._history()
        return number, controls[
            ..., controls.shape[-1] if self.applied_width is None else self.applied_width :
        ]

    def valid(self) -> Tensor:
        """Bool (batch, columns): False at padding."""
        self.settle()
        return torch.cat([p.valid for p in self._pieces], 1)

    def _history(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(chunk of each column, sums per chunk, control per chunk, valid columns)."""
        number = torch.cat([p.number for p in self._pieces], 1)
        chunks = int(number.max()) + 1
        first = self._pieces[0]
        sums = first.slot_sums.new_zeros(len(number), chunks, first.slot_sums.shape[-1])
        controls = first.slot_control.new_zeros(len(number), chunks, first.slot_control.shape[-1])
        rows = torch.arange(len(number), device=number.device)
        for piece in self._pieces:  # a later piece knows more of a chunk that goes on
            for s in range(piece.slot_number.shape[1]):
                at = piece.slot_number[:, s]
                real = (piece.number == at[:, None]).any(1) if s else at < chunks
                sums[rows[real], at[real]] = piece.slot_sums[real, s]
                controls[rows[real], at[real]] = piece.slot_control[real, s]
        return number, sums, controls, torch.cat([p.valid for p in self._pieces], 1)

    # --- what a Cache asks of its layers -------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: there are no keys here."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "the control layer holds no keys or values: the model has more layers than its config"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def offload(self) -> None:
        """Small: stays where it is."""

    def prefetch(self) -> None:
        """Small: stays where it is."""

    def reset(self) -> None:
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.running is not None:
            rows = torch.arange(len(self.running.count), device=self.running.count.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.running is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        rows = indices.to(self.running.count.device)
        self.settle()
        self.running = self.running.select(rows)
        self._pieces = [p.select(rows) for p in self._pieces]
        if self.parts is not None:
            self.parts = tuple(p.index_select(0, rows) for p in self.parts)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest columns: -n removes n of them; a positive number is the length to keep.

        Raises:
            CacheError: the cut lies inside a chunk whose features are no longer kept.
        """
        keep = tokens_to_remove if tokens_to_remove > 0 else self.columns + tokens_to_remove
        if keep >= self.columns:
            return
        if keep <= 0:
            return self._clear()
        self.settle()
        number, sums, controls, valid = self._history()
        current = number[:, keep - 1]
        features = self._recent(keep)
        cut_off = (number[:, keep:] == current[:, None]) & valid[:, keep:]
        lost = cut_off[:, : cut_off.shape[1] - features.shape[1]]
        if lost.any():
            ends = sorted({int(i) for i in (number[0, 1:] != number[0, :-1]).nonzero()[:, 0] + 1})
            raise CacheError(
                f"cannot crop to {keep} tokens: that lies inside a chunk and more than {KEPT_FEATURES} "
                f"tokens back. Crop to a chunk boundary (row 0: {ends}) or less far."
            )
        rows = torch.arange(len(number), device=number.device)
        tail = cut_off[:, cut_off.shape[1] - features.shape[1] :]
        sums[rows, current] = sums[rows, current] - (tail[..., None] * features).sum(1)
        earlier = (torch.arange(sums.shape[1], device=number.device) < current[:, None]).to(
            sums.dtype
        )
        kept, kept_valid = number[:, :keep], valid[:, :keep]
        count = ((kept == current[:, None]) & kept_valid).sum(1)
        self.running = Running(
            sums[rows, current],
            count,
            (earlier[..., None] * sums).sum(1),
            ((kept < current[:, None]) & kept_valid).sum(1),
            current,
            controls[rows, current],
        )
        slots = torch.arange(sums.shape[1], device=number.device).expand(len(rows), -1)
        recent = self._recent(0)[:, : self._recent(0).shape[1] - (self.columns - keep)]
        self._pieces = [Piece(kept, slots, sums, controls, recent, kept_valid)]
        self.columns, self.parts, self.left = keep, None, None

    def _recent(self, start: int) -> Tensor:
        """Kept features of the newest columns, from column `start` on at the earliest."""
        found, width = [], 0
        for piece in reversed(self._pieces):
            found.insert(0, piece.features)
            width += piece.features.shape[1]
            if width >= KEPT_FEATURES or piece.features.shape[1] < piece.number.shape[1]:
                break
        newest = torch.cat(found, 1)
        return newest[:, max(0, newest.shape[1] - (self.columns - start)) :]


def control_layer(cache: Cache, wiring: Wiring) -> ControlLayer:
    """The cache's control layer, appended behind its key/value layers on first use.

    Raises:
        CacheError: the cache was filled under another adapter.
    """
    if cache.layers and isinstance(cache.layers[-1], ControlLayer):
        layer = cache.layers[-1]
        owner = wiring.name
        if layer.owner != owner:
            raise CacheError(
                f"this cache was filled under adapter {layer.owner!r}, now {owner!r} is active: its keys and "
                "values belong to the other adapter. Start with a new cache."
            )
        return layer
    grow = getattr(cache, "layer_class_to_replicate", None)
    while grow is not None and len(cache.layers) < wiring.depth:
        cache.layers.append(grow())
    layer = ControlLayer(wiring.name, wiring.applied_width)
    cache.layers.append(layer)
    return layer
