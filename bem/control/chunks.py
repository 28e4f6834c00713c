"""Chunks: which tokens share one control.

A chunk begins at the first real token of a sequence, at every turn start, and every `chunk_size`
tokens after either. A turn starts at the position that *predicts* its first answer token (the last
token of the prompt): so even a one-token answer is adapted by a control that has seen the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def chunk_starts(
    valid: Bool[Tensor, "batch tokens"],
    turns: Bool[Tensor, "batch tokens"] | None,
    carried: Int[Tensor, " batch"],
    chunk_size: int,
) -> Bool[Tensor, "batch tokens"]:
    """Which tokens of a piece begin a new chunk.

    Args:
        valid: False at padding.
        turns: True where a turn starts; None: nowhere.
        carried: tokens already in the running chunk; 0: nothing seen yet.
        chunk_size: longest chunk in tokens.
    """
    return valid & (places(valid, turns, carried, chunk_size) == 0)


def places(
    valid: Bool[Tensor, "batch tokens"],
    turns: Bool[Tensor, "batch tokens"] | None,
    carried: Int[Tensor, " batch"],
    chunk_size: int,
) -> Int[Tensor, "batch tokens"]:
    """Place of each token inside its chunk, from 0; see `chunk_starts`. Undefined at padding."""
    before = valid.long().cumsum(1) - valid.long()  # real tokens of this piece before each position
    origin = -carried[:, None].expand_as(before)
    if turns is not None:
        origin = torch.where(turns & valid, before, origin).cummax(1).values
    return (before - origin) % chunk_size


def sums_by_chunk(
    features: Float[Tensor, "batch tokens width"],
    valid: Bool[Tensor, "batch tokens"],
    slot: Int[Tensor, "batch tokens"],
    place: Int[Tensor, "batch tokens"],
    slots: int,
    chunk_size: int,
) -> Float[Tensor, "batch slots width"]:
    """Sum of the features of the tokens in each slot, float64, in a fixed order on any device.

    Every token is put at its place of its chunk, then places are summed: linear in tokens, and two
    runs add the same numbers in the same order, which scatter_add does not on a GPU.
    """
    (batch, tokens, width), longest = features.shape, min(chunk_size, features.shape[1])
    if tokens == 1:  # a decoded token
        member = (slot == torch.arange(slots, device=slot.device)) & valid
        return member[..., None] * features.double()
    # in the running chunk (slot 0) a piece's first token may stand at any place: count from it
    place = torch.where(slot == 0, valid.long().cumsum(1) - 1, place)
    cells = features.new_zeros(batch, slots * longest + 1, width)  # the last one takes the padding
    at = torch.where(valid, slot * longest + place, slots * longest)
    cells.scatter_(1, at[..., None].expand(-1, -1, width), features)
    return cells[:, :-1].unflatten(1, (slots, longest)).sum(2, dtype=torch.float64)


def turns_from_labels(labels: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """Turn starts of a training batch: one position before each run of labelled tokens.

    Args:
        labels: -100 outside answers.
    Returns:
        True at turn starts; a run that begins at position 0 starts its turn there.
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


@dataclass(frozen=True)
class Documents:
    """Documents packed into the rows of a batch, told apart by positions that start again.

    Control must not leak from one to the next, so that each is routed as a sequence of its own.
    """

    columns: Int[Tensor, "documents longest"]
    """Flattened token (row * tokens + column) of each place of each document; 0 where `real` is False."""
    real: Bool[Tensor, "documents longest"]
    place: Int[Tensor, "batch tokens"]
    """document * longest + place of each token."""

    @classmethod
    def of(
        cls, positions: Int[Tensor, "rows tokens"], valid: Bool[Tensor, "batch tokens"]
    ) -> Documents | None:
        """The documents of a batch; None if every row holds one. Reads back from the device once."""
        positions = positions.to(valid.device).expand_as(valid)
        restart = torch.zeros_like(valid)
        restart[:, 1:] = (positions[:, 1:] <= positions[:, :-1]) & valid[:, 1:] & valid[:, :-1]
        if not bool(restart.any()):
            return None
        restart[:, 0] = True
        document = restart.flatten().long().cumsum(0) - 1
        begin = restart.flatten().nonzero()[:, 0]
        flat = torch.arange(len(document), device=document.device)
        within = flat - begin[document]
        longest = int(within.max()) + 1
        columns = torch.zeros(len(begin) * longest, dtype=torch.long, device=document.device)
        place = document * longest + within
        columns[place] = flat
        real = torch.zeros_like(columns, dtype=torch.bool)
        real[place] = True
        shape = (len(begin), longest)
        return cls(columns.view(shape), real.view(shape), place.view_as(valid))

    def fold(self, x: Tensor) -> Tensor:
        """From tokens (batch, tokens, ...) to documents (documents, longest, ...)."""
        return x.flatten(0, 1)[self.columns]

    def fold_rows(self, x: Tensor, tokens: int) -> Tensor:
        """From rows (batch, ...) to documents (documents, ...)."""
        return x[self.columns[:, 0] // tokens]

    def unfold(self, x: Int[Tensor, "documents longest"]) -> Int[Tensor, "batch tokens"]:
        """From documents back to tokens."""
        return x.flatten()[self.place]
