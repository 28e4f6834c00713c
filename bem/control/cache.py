"""Control lives with the KV cache: a layer of the `Cache`, behind the layers of keys and values.

So it survives whatever happens to the cache: beam reordering, batch selection, cropping, copying,
reuse of a prefix. The layer is a view: its rows are the slots of a `ControlState` of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from bem.control.context import Updates
from bem.control.controller import Pooled, Running
from bem.control.state import ControlState
from bem.control.wiring import Acting, Wiring
from bem.errors import CacheError


class ControlLayer(CacheLayerMixin):
    """The state of one batch of sequences under one adapter."""

    is_croppable = True
    supports_early_init = False
    is_sliding = False
    ragged = False
    """Its rows stand at different places, and it knows itself which tokens of a piece are padding."""

    def __init__(
        self, wiring: Wiring, owner: str, is_compileable: bool = False, lowest: Any = None
    ):
        """owner: digest of the weights under which the cache is filled.

        is_compileable: as the cache's other layers; a model masks the empty end of a static cache only
            while every layer is.
        lowest: the cache's first layer, whose sizes a mask has where the model asks this one.
        """
        super().__init__()
        self.lowest = lowest
        self.is_compileable = is_compileable
        self.name, self.layout, self.widths = wiring.name, wiring.layout, wiring.widths
        self.owner = owner
        self.is_initialized = True  # nothing is allocated up front
        self._clear()

    def _clear(self) -> None:
        self.refusal = ""  # why this cache cannot be continued
        self.acting: Acting | None = None  # under what it goes on
        self.state: ControlState | None = None
        self.tables: tuple[Tensor, ...] | None = None  # the running chunk's control, per member
        self.updates: Updates = ()  # of the members, while `tables` are
        self.counts: list[int] | None = (
            None  # tokens in the running chunk of each row; None: unknown
        )

    @property
    def columns(self) -> int:
        """Tokens of each row, padding included."""
        return self.state.columns[0] if self.state is not None else 0

    @property
    def slots(self) -> range:
        """The rows of the batch."""
        return range(0 if self.state is None else len(self.state))

    # --- reading ----------------------------------------------------------------------------------

    def before(self, batch: int, device: torch.device) -> Running:
        """The state from which the next piece is read."""
        if self.state is None:
            self.state = ControlState(self.layout, batch, device)
        if batch != len(self.state):
            raise CacheError(
                f"the cache holds {len(self.state)} sequences, the batch has {batch}: repeat or select the "
                "cache's rows first."
            )
        return self.state.before(self.slots)

    def append(self, pooled: Pooled, features: Tensor, valid: Tensor, begun: int) -> None:
        """Take over the result of a forward pass over one piece."""
        assert self.state is not None
        decoded = features.shape[1] == 1 and self.counts is not None
        self.state.append(self.slots, pooled, features, valid, begun)
        self.tables = None
        size = self.layout.chunk_size
        self.counts = [c % size + 1 for c in self.counts or ()] if decoded else None

    def real(self, tokens: int) -> Tensor | None:
        """Bool (batch, tokens): False at a piece's padding; None: whoever calls the model says it."""
        return None

    def known(self, name: str) -> Tensor | None:
        """What was said of each row beside its tokens (batch, width); None: nothing was read yet."""
        return None if self.state is None else self.state.conditioning[name]

    def tell(self, name: str, value: Tensor) -> None:
        """It holds from now on."""
        assert self.state is not None
        self.state.conditioning[name].copy_(value)

    def count(self) -> None:
        """Read back, once for a prompt, how full the running chunks are: decoding then counts on."""
        if self.state is not None and self.counts is None:
            empty = self.layout.chunk_size  # nothing read yet: the first token begins a chunk
            counts, numbers = self.state.running.count.tolist(), self.state.running.number.tolist()
            self.counts = [c if n else empty for c, n in zip(counts, numbers, strict=True)]

    def stays(self) -> bool:
        """Does one more token fit the running chunk of every row?"""
        if self.counts is None:
            self.count()
        return bool(self.counts) and max(self.counts) < self.layout.chunk_size

    def running(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Updates]:
        """Control of the running chunks, one table (rows, width) per member, and the members' updates
        (see `StepContext`)."""
        assert self.state is not None and self.acting is not None
        if self.tables is None or self.tables[0].dtype != dtype:
            self.tables = self.state.running.control.to(dtype).split(self.widths, -1)
            self.updates = ()
        if torch.is_grad_enabled():
            return self.tables, ()
        if not self.updates:
            rows = len(self.state)
            self.updates = [
                m.ready(dtype, rows) if hasattr(m, "ready") else None for m in self.acting.members
            ]
        return self.tables, self.updates

    def append_token(self, features: Tensor) -> None:
        """A decoded token of every row, inside its chunk."""
        assert self.state is not None and self.counts is not None
        self.state.append_token(self.slots, features)
        self.counts = [c + 1 for c in self.counts]

    def goes_on(self, wiring: Wiring) -> bool:
        """Is it bound to what acted when it began, on this very adapter?"""
        if self.state is None or self.acting is None or self.acting.origin is None:
            return False
        return self.acting.origin is wiring.controller.origin

    # --- looking ----------------------------------------------------------------------------------

    def applied(self) -> tuple[Tensor, Tensor]:
        """Chunk number of every column (batch, columns), and what acted on the model in every chunk
        (batch, chunks, applied width)."""
        return self._numbers(), self._history()[..., : self.layout.applied]

    def memory(self) -> tuple[Tensor, Tensor]:
        """Chunk number of every column, and the controller's own tail in every chunk."""
        return self._numbers(), self._history()[..., self.layout.applied :]

    def valid(self) -> Tensor:
        """Bool (batch, columns): False at padding."""
        return self._filled().valid[:, : self.columns]

    def _numbers(self) -> Tensor:
        return self._filled().numbers(self.slots)

    def _history(self) -> Tensor:
        return self._filled().history(self.slots)

    def _filled(self) -> ControlState:
        if self.state is None:
            raise CacheError("the cache is empty.")
        return self.state

    # --- what a Cache asks of its layers ----------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: there are no keys here."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise CacheError(
            "the control layer holds no keys or values: the model has more layers than its config"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        of_lowest = getattr(self.lowest, "get_mask_sizes", None)
        return of_lowest(query_length) if of_lowest else (self.columns + query_length, 0)

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
        if self.state is not None:
            rows = torch.arange(len(self.state), device=self.state.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        rows = indices.tolist()
        if len(rows) != len(self.state):
            self.updates = ()  # they were made for so many rows
        self.state = self.state.select(indices)
        self.counts = None if self.counts is None else [self.counts[r] for r in rows]
        if self.tables is not None:
            at = indices.to(self.state.device)
            self.tables = tuple(t.index_select(0, at) for t in self.tables)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest columns: -n removes n of them; a positive number is the length to keep.

        Raises:
            CacheError: the cut lies inside a chunk whose features are no longer kept.
        """
        keep = tokens_to_remove if tokens_to_remove > 0 else self.columns + tokens_to_remove
        if self.state is None or keep >= self.columns:
            return
        if keep <= 0:
            return self._clear()
        self.state.crop(self.slots, keep)
        self.tables = self.counts = None


def control_layer(cache: Cache, wiring: Wiring) -> ControlLayer:
    """The cache's control layer, appended behind its key/value layers on first use.

    Raises:
        CacheError: the cache was filled under another adapter, or under other weights of this one.
    """
    if cache.layers and isinstance(layer := cache.layers[-1], ControlLayer):
        if layer.goes_on(wiring):
            return layer
        acting = wiring.acting()
        owner = wiring.digest(acting)
        if layer.name != wiring.name:
            raise CacheError(
                f"this cache was filled under adapter {layer.name!r}, now {wiring.name!r} is active: its keys "
                "and values belong to the other adapter. Start with a new cache."
            )
        if layer.owner != owner:
            if layer.state is not None:
                raise CacheError(
                    f"this cache was filled under weights {layer.owner[:12]}, now {owner[:12]} act: its keys and "
                    "values belong to the former. Start with a new cache."
                )
            layer.owner, layer.updates = owner, ()
        layer.acting = acting
        return layer
    grow = getattr(cache, "layer_class_to_replicate", None)
    while grow is not None and len(cache.layers) < wiring.depth:
        cache.layers.append(grow())
    acting = wiring.acting()
    lowest = cache.layers[0] if cache.layers else None
    layer = ControlLayer(wiring, wiring.digest(acting), cache.is_compileable, lowest)
    layer.acting = acting
    cache.layers.append(layer)
    return layer
