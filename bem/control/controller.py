"""The controller: one small network that reads pooled hidden states and writes each chunk's code.

    z = MLP([mean hidden of the last chunk, mean hidden of all earlier tokens, evidence])  in R^d_control

It never sees the chunk that its code governs: the code of a chunk depends on earlier tokens only, so
all chunks of a prompt are coded in one parallel pass, and a token decoded later changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bem.control.chunks import chunk_starts
from bem.variants.base import Code


@dataclass(frozen=True)
class Running:
    """What the next token needs beside keys and values; one row per sequence."""

    sums: Tensor  # (batch, features): sum over the running chunk
    count: Tensor  # int (batch,): tokens in it
    done_sums: Tensor  # (batch, features): sum over all completed chunks
    done_count: Tensor  # int (batch,)
    number: Tensor  # int (batch,): chunks begun so far
    control: Tensor  # (batch, control_width): control of the running chunk

    def select(self, rows: Tensor) -> Running:
        """Keep, repeat or reorder sequences."""
        return Running(**{k: v.index_select(0, rows.to(v.device)) for k, v in vars(self).items()})


@dataclass(frozen=True)
class Routed:
    """Result of reading one piece of a sequence."""

    control: Tensor  # (batch, slots, width): control of each slot; slot 0 is the running chunk
    slot: Tensor  # int (batch, tokens): which slot governs each token
    sums: Tensor  # (batch, slots, features): sums per slot, the carried part included
    count: Tensor  # int (batch, slots)
    before: Running  # the state that the piece was read from

    @property
    def number(self) -> Tensor:
        """Chunk number in the sequence of each slot, (batch, slots)."""
        return self.before.number[:, None] + torch.arange(
            self.sums.shape[1], device=self.slot.device
        )

    def after(self) -> Running:
        """The state after the last token of the piece."""
        last = self.slot[:, -1]
        earlier = (torch.arange(self.sums.shape[1], device=last.device) < last[:, None]).to(
            self.sums.dtype
        )
        rows = torch.arange(len(last), device=last.device)
        return Running(
            sums=self.sums[rows, last],
            count=self.count[rows, last],
            done_sums=self.before.done_sums + (earlier[..., None] * self.sums).sum(1),
            done_count=self.before.done_count + (earlier.to(self.count.dtype) * self.count).sum(1),
            number=self.before.number + last,
            control=self.control[rows, last],
        )


class ChunkReader(nn.Module, ABC):
    """Pools a sequence chunk by chunk and decides each chunk's control. Abstract.

    What the next chunk needs to know of the last decision is the tail of its control: `tail_width`
    floats that no adapter reads, and that travel with the cache as all control does.
    """

    chunk_size: int
    width: int  # features per token
    n_heads: int = 0  # heads whose statistics are pooled
    n_evidence: int = 0  # evidence features; the very last floats of the tail
    tail_width: int = 0
    blind: bool = False  # every evidence feature reads as zero

    def start(self, batch: int, control_width: int, device: torch.device) -> Running:
        """The state of a sequence of which nothing has been read."""
        floats = torch.zeros(batch, self.width, device=device)
        ints = torch.zeros(batch, dtype=torch.long, device=device)
        control = torch.zeros(batch, control_width, device=device)
        return Running(floats, ints, floats, ints, ints, control)

    def features(self, hidden: Tensor, head_input: Tensor | None) -> Tensor:
        """Float32 features of each token (batch, tokens, self.width); see `token_features`."""
        return token_features(hidden, head_input, self.n_heads)

    def pool(
        self, features: Tensor, valid: Tensor, turns: Tensor | None, before: Running, slots: int
    ) -> Routed:
        """Cut a piece into chunks and sum the features of each; controls are filled in by the caller.

        Args:
            features: float32 (batch, tokens, self.width).
            valid, turns: see `chunk_starts`.
            before: state after the tokens before this piece.
            slots: most chunks that can begin in the piece; one more slot is the running chunk.
        """
        slot = chunk_starts(valid, turns, before.count, self.chunk_size).long().cumsum(1)
        member = slot[:, None] == torch.arange(slots + 1, device=slot.device)[:, None]
        member = member & valid[:, None]
        # a product with a 0/1 matrix sums in a fixed order: scatter_add does not on a GPU
        sums = torch.bmm(member.to(features.dtype), features)
        count = member.long().sum(-1)
        sums = torch.cat([sums[:, :1] + before.sums[:, None], sums[:, 1:]], 1)
        count = torch.cat([count[:, :1] + before.count[:, None], count[:, 1:]], 1)
        return Routed(before.control[:, None], slot, sums, count, before)

    @abstractmethod
    def decide(
        self,
        members: Sequence[Any],
        pooled: Routed,
        turns: Tensor | None,
        evidence: Tensor | None,
        route: Tensor | None,
    ) -> Tensor:
        """Controls of the chunks that begin in the piece: slots 1, 2, ..., (batch, slots, width).

        Args:
            members: modules with a control, in the order in which theirs are concatenated.
            turns: bool (batch, tokens), True where a turn starts; None: nowhere.
            evidence: of each of these chunks (batch, slots, n_evidence); None: it reads none.
            route: what the caller wants instead, see `AgenticRouter`; None: nothing.
        """

    @abstractmethod
    def flops_per_chunk(self) -> int:
        """Matrix FLOPs for one chunk slot, without pooling."""


class Controller(ChunkReader):
    """Codes every chunk from the tokens before it; see the module's docstring.

    Features of a token: its hidden state entering the router layer and, if `n_heads` > 0, each
    head's energy (mean square of its slice of the attention output one layer below) and the square
    of that, from which mean and spread over a chunk follow. A sequence's first chunk has no past:
    its code is a learned prior, moved by the evidence if `n_evidence` > 0.
    """

    def __init__(
        self,
        d_model: int,
        d_control: int,
        chunk_size: int,
        n_heads: int = 0,
        n_evidence: int = 0,
        blind: bool = False,
    ):
        """n_evidence: number of evidence features, 0: reads none; blind: they all read as zero."""
        super().__init__()
        self.d_model, self.n_heads, self.chunk_size = d_model, n_heads, chunk_size
        self.n_evidence, self.blind = n_evidence, blind
        self.read = nn.Linear(2 * d_model + n_evidence, d_control)
        self.write = nn.Linear(d_control, d_control)
        self.prior = nn.Parameter(torch.zeros(d_control))
        if n_evidence:
            self.hint = nn.Linear(n_evidence, d_control, bias=False)
            nn.init.zeros_(self.hint.weight)
        self.width = d_model + 2 * n_heads  # features per token
        self.tail_width = n_evidence

    def decide(
        self,
        members: Sequence[Any],
        pooled: Routed,
        turns: Tensor | None,
        evidence: Tensor | None,
        route: Tensor | None,
    ) -> Tensor:
        code = self.code(pooled, evidence)
        controls = [member.control(code) for member in members]
        return torch.cat(controls if evidence is None else [*controls, evidence], -1)

    def code(self, pooled: Routed, evidence: Tensor | None = None) -> Code:
        """The code of every chunk that begins in the piece: slots 1, 2, ...

        Args:
            evidence: of each of these chunks (batch, slots, n_evidence); None: it reads none.
        """
        sums, count = pooled.sums[:, :-1], pooled.count[:, :-1]
        all_sums = pooled.before.done_sums[:, None] + sums.cumsum(1)
        all_count = pooled.before.done_count[:, None] + count.cumsum(1)
        last = sums / count.clamp(min=1)[..., None]
        past = all_sums / all_count.clamp(min=1)[..., None]
        seen = (all_count > 0)[..., None]
        d = self.d_model
        read = [_scale(last[..., :d]), _scale(past[..., :d])]
        first = self.prior
        if evidence is not None:
            read.append(evidence)
            first = first + self.hint(evidence)
        z = torch.where(seen, self._mlp(torch.cat(read, -1)), first)
        heads = torch.where(seen, self._head_statistics(last), 0.0) if self.n_heads else None
        return Code(z, heads, pooled.number[:, 1:], evidence, pooled.count[:, 1:] > 0)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.write(F.gelu(self.read(x)))

    def _head_statistics(self, mean: Tensor) -> Tensor:
        """log energy and relative spread of each head over a chunk, (..., 2 * n_heads)."""
        energy, square = mean[..., self.d_model :].chunk(2, -1)
        energy = energy.clamp(min=1e-12)
        spread = (square - energy.square()).clamp(min=0.0).sqrt() / energy
        return torch.cat([energy.log() / 10, spread / 10], -1)

    def flops_per_chunk(self) -> int:
        """Matrix FLOPs for one chunk slot, without pooling."""
        hint = self.hint.weight.numel() if self.n_evidence else 0
        return 2 * (self.read.weight.numel() + self.write.weight.numel() + hint)


def token_features(hidden: Tensor, head_input: Tensor | None, n_heads: int) -> Tensor:
    """Float32 features of each token: (batch, tokens, d_model + 2 * n_heads).

    Args:
        hidden: hidden states entering the router layer (batch, tokens, d_model).
        head_input: input of the attention output projection one layer below, or None at layer 0.
        n_heads: 0 leaves the head statistics out.
    """
    hidden = hidden.detach().float()  # the base is frozen: nothing below can learn
    if not n_heads:
        return hidden
    if head_input is None:
        return torch.cat([hidden, hidden.new_zeros(*hidden.shape[:2], 2 * n_heads)], -1)
    energy = head_input.detach().float().unflatten(-1, (n_heads, -1)).square().mean(-1)
    return torch.cat([hidden, energy, energy.square()], -1)


def evidence_of_chunks(given: Tensor | None, routed: Routed, width: int) -> Tensor:
    """Evidence of every chunk that begins in a piece, (batch, slots, width).

    Args:
        given: handed in with the piece: (batch, width) for all of it, (batch, tokens, width) of
            which a chunk takes its first token's; None: what held before the piece goes on.
        routed: the piece, cut into chunks.
    """
    slots = routed.sums.shape[1] - 1
    if given is None:  # the evidence is the tail of the control: it travels with the cache
        given = routed.before.control[:, routed.before.control.shape[1] - width :]
    if given.dim() == 2:
        return given.float()[:, None].expand(-1, slots, -1)
    first = first_tokens(routed)
    return given.float().gather(1, first[..., None].expand(-1, -1, width))


def first_tokens(routed: Routed) -> Tensor:
    """Column of the first token of each chunk that begins in a piece, int (batch, slots); 0 for a
    slot that holds no token."""
    slots = routed.sums.shape[1] - 1
    new = torch.arange(1, slots + 1, device=routed.slot.device)
    return (routed.slot[:, None] == new[:, None]).to(torch.int8).argmax(-1)


def with_control(pooled: Routed, control: Tensor) -> Routed:
    """Put the controls of the new chunks behind the running chunk's."""
    return replace(pooled, control=torch.cat([pooled.control, control], 1))


def _scale(x: Tensor) -> Tensor:
    """Layer norm without weights: hidden states of any model come at one scale."""
    return F.layer_norm(x, x.shape[-1:])
