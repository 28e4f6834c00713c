"""Names for cached chunks: two sequences may share keys and values where these agree.

    root            sha256(base digest, dtype, chunk size, tokenizer)
    key of a chunk  sha256(key of the chunk before, weights that acted, control that was applied, token ids)

What was *applied* is named, not who decided it: a control that another controller would have chosen
just the same keeps the chunk's name. The state from which generation goes on does depend on who
decides, so that it is stored under `ChunkKey.state`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bem.control.cache import ControlLayer
from bem.errors import CacheError


@dataclass(frozen=True)
class ChunkKey:
    """Name of everything that keys and values up to the end of a chunk depend on."""

    digest: str

    @classmethod
    def root(cls, base: str, dtype: torch.dtype, chunk_size: int, tokenizer: str) -> ChunkKey:
        """Where every sequence begins.

        Args:
            base: digest of the frozen base's weights.
            dtype: in which it computes.
            tokenizer: digest of the tokenizer, or its name: what gives the token ids their meaning.
        """
        return cls(sha256(f"{base} {dtype} {chunk_size} {tokenizer}".encode()).hexdigest())

    def salted(self, salt: str) -> ChunkKey:
        """The root of those who share chunks among themselves alone."""
        return ChunkKey(sha256(f"{self.digest} for {salt}".encode()).hexdigest()) if salt else self

    def extend(
        self, token_ids: Sequence[int], control: Float[Tensor, " width"], weights: str
    ) -> ChunkKey:
        """The key of the next chunk.

        Args:
            token_ids: of the chunk, padding left out.
            control: as it was applied.
            weights: digest of the weights that acted in this chunk.
        """
        name = sha256(f"{self.digest} {weights} {list(token_ids)} ".encode())
        # + 0.0: no negative zeros, which act as zeros do
        name.update((control.detach().to("cpu", torch.float32) + 0.0).numpy().tobytes())
        return ChunkKey(name.hexdigest())

    def state(self, controller: str) -> str:
        """Name of what the next token needs beside keys and values.

        Args:
            controller: digest of the controller's or router's weights.
        """
        return sha256(f"{self.digest} {controller}".encode()).hexdigest()


def chunk_keys(
    layer: ControlLayer,
    token_ids: Int[Tensor, "batch columns"],
    root: ChunkKey,
    weights: str | Callable[[Tensor], str],
) -> list[list[ChunkKey]]:
    """Keys of every chunk of every sequence in a cache, in order; the last chunk may still grow.

    Args:
        layer: the cache's control layer.
        token_ids: all tokens that the cache holds, padding included.
        root: see `ChunkKey.root`.
        weights: digest of the weights that acted, or a function from a chunk's applied control to it
            (`Mounted.acting`): then a chunk keeps its name while the experts that acted in it stay.
    Raises:
        CacheError: `token_ids` are not the cache's.
    """
    number, control = layer.applied()
    if token_ids.shape != number.shape:
        raise CacheError(
            f"token_ids {tuple(token_ids.shape)} must be what the cache holds: {tuple(number.shape)}."
        )
    valid, keys = layer.valid(), []
    for row in range(len(number)):
        parent, names = root, []
        for chunk in range(1, int(number[row].max()) + 1):  # 0 stands before the first token
            ids = token_ids[row][(number[row] == chunk) & valid[row]].tolist()
            applied = control[row, chunk]
            acted = weights if isinstance(weights, str) else weights(applied)
            parent = parent.extend(ids, applied, acted)
            names.append(parent)
        keys.append(names)
    return keys
