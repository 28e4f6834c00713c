"""What is derived from weights and kept until one of them changes."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

_writes = attrgetter("_version")


class Watch:
    """Says whether tensors are unchanged since the last call.

    It goes by address and by torch's count of writes, and keeps the tensors alive, so that no address
    is used for another. Writing through `.data` or in inference mode is not counted.
    """

    def __init__(self) -> None:
        self._key: list[int] = []
        self._held: list[Tensor] = []

    def changed(self, *tensors: Tensor) -> bool:
        """Other tensors, or written to, since the last call."""
        key = [*map(Tensor.data_ptr, tensors), *_all_writes(tensors)]
        if key == self._key:
            return False
        self._key, self._held = key, [t.detach() for t in tensors]
        return True


def _all_writes(tensors: tuple[Tensor, ...]) -> list[int]:
    try:
        return list(map(_writes, tensors))  # asked for each decoded token: no loop of ours
    except RuntimeError:  # inference tensors count nothing
        return [-1 if t.is_inference() else t._version for t in tensors]


class ComputeCopies:
    """Copies of weights in the dtype that computes, made anew when a weight changes."""

    def __init__(self) -> None:
        self._watch, self._dtype = Watch(), None
        self._copies: tuple[Tensor, ...] = ()

    def __call__(self, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        """The weights in `dtype`: themselves if they have it, differentiable if a gradient is wanted."""
        if all(w.dtype == dtype for w in weights):
            return weights
        wants_gradient = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
        if wants_gradient or torch.compiler.is_compiling():
            return tuple(w.to(dtype) for w in weights)
        if self._watch.changed(*weights) or dtype != self._dtype:
            with torch.inference_mode(False), torch.no_grad():
                self._copies = tuple(w.to(dtype) for w in weights)
            self._dtype = dtype
        return self._copies
