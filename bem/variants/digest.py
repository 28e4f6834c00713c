"""The one digest of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_digest(named: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values of tensors, in the order of their names.

    Values count, not the dtype that holds them: float32 and bfloat16 of equal numbers are equal.
    """
    digest = hashlib.sha256()
    for name in sorted(named):
        tensor = named[name].detach().cpu()
        data = tensor.float().contiguous()
        if not tensor.is_floating_point() and not torch.equal(data.to(tensor.dtype), tensor):
            data = tensor.contiguous()  # packed integers that float32 would round
        digest.update(f"{name} {tuple(data.shape)}".encode())
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()
