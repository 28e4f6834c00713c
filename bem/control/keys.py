"""Names for cached chunks: two sequences may share keys and values where these agree.

    key = sha256(key of the chunk before, evidence, weights, applied control, token ids)

What was *applied* is named, not who decided it: a control that another controller would have chosen
just the same keeps the chunk's name.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

from torch import Tensor

from bem.control.cache import ControlLayer
from bem.errors import CacheError


def chunk_keys(
    layer: ControlLayer,
    token_ids: Tensor,
    weights: str | Callable[[Tensor], str],
    evidence: str = "",
) -> list[list[str]]:
    """Keys of every chunk of every sequence in a cache, in order; the last chunk may still grow.

    Args:
        layer: the cache's control layer.
        token_ids: int (batch, columns), all tokens that the cache holds, padding included.
        weights: digest of the weights that acted (a checkpoint's manifest has one per file), or a
            function from a chunk's applied control to it (`Mounted.acting`): then a chunk keeps its
            name while the experts that acted in it stay, whatever becomes of the others.
        evidence: `EvidenceRecord.digest` of the passages that the control was made from.
    Raises:
        CacheError: `token_ids` are not the cache's.
    """
    number, control = layer.applied()
    if token_ids.shape != number.shape:
        raise CacheError(
            f"token_ids {tuple(token_ids.shape)} must be what the cache holds: {tuple(number.shape)}."
        )
    valid = layer.valid()
    return [
        _of_sequence(number[row], control[row], token_ids[row], valid[row], weights, evidence)
        for row in range(len(number))
    ]


def _of_sequence(
    number: Tensor,
    control: Tensor,
    ids: Tensor,
    valid: Tensor,
    weights: str | Callable[[Tensor], str],
    evidence: str,
) -> list[str]:
    keys: list[str] = []
    for chunk in range(1, int(number.max()) + 1):  # slot 0 stands before the first token
        tokens = ids[(number == chunk) & valid].tolist()
        parent = keys[-1] if keys else ""
        acted = weights if isinstance(weights, str) else weights(control[chunk])
        state = sha256(f"{parent} {evidence} {acted} {tokens} ".encode())
        state.update(control[chunk].detach().float().cpu().numpy().tobytes())
        keys.append(state.hexdigest())
    return keys
