"""Chunks: which tokens share one control.

A chunk begins at the first real token of a sequence, at every turn start, and every `chunk_size`
tokens after either. A turn starts at the position that *predicts* its first answer token (the last
token of the prompt): so even a one-token answer is adapted by a control that has seen the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_starts(valid: Tensor, turns: Tensor | None, carried: Tensor, chunk_size: int) -> Tensor:
    """Which tokens of a piece begin a new chunk.

    Args:
        valid: bool (batch, tokens), False at padding.
        turns: bool (batch, tokens), True where a turn starts; None: nowhere.
        carried: int (batch,), tokens already in the running chunk; 0: nothing seen yet.
        chunk_size: longest chunk in tokens.
    Returns:
        bool (batch, tokens).
    """
    before = valid.long().cumsum(1) - valid.long()  # real tokens of this piece before each position
    origin = -carried[:, None].expand_as(before)
    if turns is not None:
        origin = torch.where(turns & valid, before, origin).cummax(1).values
    return valid & ((before - origin) % chunk_size == 0)


def turns_from_labels(labels: Tensor) -> Tensor:
    """Turn starts of a training batch: one position before each run of labelled tokens.

    Args:
        labels: int (batch, tokens), -100 outside answers.
    Returns:
        bool (batch, tokens); a run that begins at position 0 starts its turn there.
    """
    answer = labels != -100
    first = answer.clone()
    first[:, 1:] &= ~answer[:, :-1]
    turns = torch.zeros_like(first)
    turns[:, :-1] = first[:, 1:]
    turns[:, 0] |= first[:, 0]
    return turns


def slots_needed(tokens: int, turns: Tensor | None, chunk_size: int) -> int:
    """Upper bound on the chunks that can begin in a piece of `tokens` tokens."""
    extra = 0 if turns is None else int(turns.sum(1).max())
    return -(-tokens // chunk_size) + extra
