"""The controller: one small network that reads pooled hidden states and writes each chunk's code.

    z = MLP([mean hidden of the last chunk, mean hidden of all earlier tokens, conditioning])  in R^d_control

It never sees the chunk that its code governs: the code of a chunk depends on earlier tokens only, so
all chunks of a prompt are coded in one parallel pass, and a token decoded later changes nothing.

Code is rounded to a grid (straight through in training), and what follows from it is computed in
float64: hidden states of a sequence alone, in a batch and through a cache differ in their last bits,
the control that is applied does not, so that a cached chunk has the same name in all three.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bem.control.chunks import places, sums_by_chunk
from bem.variants.base import Code, linear64

CODE_GRID, HEAD_GRID = 8, 32
"""Steps per unit of z and of the head statistics. Two ways of computing the same float32 hidden states
move z by some 1e-8 to 1e-7 on average; the probability that one of its numbers crosses a step, so that a
chunk gets two names, is that times the steps, summed over the numbers: 1e-5 to 1e-4 a chunk."""


@dataclass(frozen=True)
class Running:
    """What the next token needs beside keys and values; one row per sequence."""

    sums: Float[Tensor, "batch features"]
    """Float64: sum over the running chunk."""
    count: Int[Tensor, " batch"]
    """Tokens in it."""
    done_sums: Float[Tensor, "batch features"]
    """Float64: sum over all completed chunks."""
    done_count: Int[Tensor, " batch"]
    number: Int[Tensor, " batch"]
    """Chunks begun so far."""
    control: Float[Tensor, "batch width"]
    """Control of the running chunk."""

    def select(self, rows: Tensor) -> Running:
        """Keep, repeat or reorder sequences."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def map(self, function: Any) -> Running:
        """The same with a function applied to every tensor."""
        return Running(*(function(getattr(self, f.name)) for f in fields(self)))


@dataclass(frozen=True)
class Pooled:
    """One piece of each sequence, cut into chunks. Slot 0 is the chunk that was running before."""

    slot: Int[Tensor, "batch tokens"]
    """Which slot governs each token."""
    sums: Float[Tensor, "batch slots features"]
    """Float64, the carried part included."""
    count: Int[Tensor, "batch slots"]
    before: Running
    """The state that the piece was read from."""
    control: Float[Tensor, "batch decided width"]
    """Control of each slot; before `with_control` of slot 0 alone."""

    @property
    def number(self) -> Int[Tensor, "batch slots"]:
        """Chunk number in the sequence of each slot."""
        slots = torch.arange(self.sums.shape[1], device=self.slot.device)
        return self.before.number[:, None] + slots

    @property
    def first_tokens(self) -> Int[Tensor, "batch new"]:
        """Column of the first token of each chunk that begins here (slots 1, 2, ...); 0 for a slot
        that holds no token."""
        tokens, new = self.slot.shape[1], self.sums.shape[1] - 1
        begins = torch.ones_like(self.slot, dtype=torch.bool)
        begins[:, 1:] = self.slot[:, 1:] != self.slot[:, :-1]
        columns = torch.arange(tokens, device=self.slot.device).expand_as(self.slot)
        first = columns.new_zeros(len(columns), new + 2)  # one cell takes what begins no new chunk
        at = torch.where(begins & (self.slot > 0), self.slot, new + 1)
        return first.scatter_(1, at, columns)[:, 1 : new + 1]

    def with_control(self, control: Float[Tensor, "batch new width"]) -> Pooled:
        """Put the controls of the new chunks behind the running chunk's."""
        return replace(self, control=torch.cat([self.control, control], 1))

    def after(self) -> Running:
        """The state after the last token of the piece."""
        last = self.slot[:, -1]
        slots = torch.arange(self.sums.shape[1], device=last.device)
        earlier = (slots < last[:, None]).to(self.sums.dtype)
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
    tail_width: int = 0
    conditioning: dict[str, int]
    """Name -> width of what may be known of a sequence beside its tokens."""
    blind: bool = False  # all conditioning reads as zero
    encoder: str = ""
    """Whose numbers `vision` is: `encoder_id` of a tower; "": it reads none."""
    routes: bool = False  # follows the route that a caller gives
    origin: object = None
    """Of all that `acting` returns."""

    def acting(self) -> Any:
        """An `Acting` that will not change any more; None: this controller and its modules, as they are."""
        return None

    def start(self, batch: int, control_width: int, device: torch.device) -> Running:
        """The state of a sequence of which nothing has been read."""
        floats = torch.zeros(batch, self.width, device=device, dtype=torch.float64)
        ints = torch.zeros(batch, dtype=torch.long, device=device)
        return Running(
            floats, ints, floats, ints, ints, torch.zeros(batch, control_width, device=device)
        )

    def features(
        self,
        hidden: Float[Tensor, "batch tokens d_model"],
        head_input: Float[Tensor, "batch tokens d_attn"] | None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Float32 features of each token; see `token_features`."""
        return token_features(hidden, head_input, self.n_heads)

    def pool(
        self,
        features: Float[Tensor, "batch tokens width"],
        valid: Bool[Tensor, "batch tokens"],
        turns: Bool[Tensor, "batch tokens"] | None,
        before: Running,
        new: int,
    ) -> Pooled:
        """Cut a piece into chunks and sum the features of each.

        Args:
            valid, turns: see `chunk_starts`.
            before: state after the tokens before this piece.
            new: most chunks that can begin in the piece.
        """
        place = places(valid, turns, before.count, self.chunk_size)
        slot = (valid & (place == 0)).long().cumsum(1)
        sums = sums_by_chunk(features, valid, slot, place, new + 1, self.chunk_size)
        count = torch.zeros(len(slot), new + 1, dtype=torch.long, device=slot.device)
        count = count.scatter_add(1, slot, valid.long())  # whole numbers: any order is exact
        sums = torch.cat([sums[:, :1] + before.sums[:, None], sums[:, 1:]], 1)
        count = torch.cat([count[:, :1] + before.count[:, None], count[:, 1:]], 1)
        return Pooled(slot, sums, count, before, before.control[:, None])

    @abstractmethod
    def decide(
        self,
        members: Sequence[Any],
        pooled: Pooled,
        turns: Bool[Tensor, "batch tokens"] | None,
        conditioning: dict[str, Tensor],
        route: Tensor | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch new width"]:
        """Controls of the chunks that begin in the piece: slots 1, 2, ...; float64, the tail included.

        Args:
            members: modules with a control, in the order in which theirs are concatenated.
            turns: True where a turn starts; None: nowhere.
            conditioning: name -> what is known at each of these chunks (batch, new, width).
            route: what the caller wants instead, see `AgenticRouter`; None: nothing.
            dtype: in which the control will be applied.
        """

    @abstractmethod
    def flops_per_chunk(self) -> int:
        """Matrix FLOPs for one chunk slot."""


class Controller(ChunkReader):
    """Codes every chunk from the tokens before it; see the module's docstring.

    Features of a token: its hidden state entering the router layer and, if `n_heads` > 0, each
    head's energy (mean square of its slice of the attention output one layer below) and the square
    of that, from which mean and spread over a chunk follow. A sequence's first chunk has no past:
    its code is a learned prior, moved by the conditioning. Without conditioning nothing is moved.
    """

    def __init__(
        self,
        d_model: int,
        d_control: int,
        chunk_size: int,
        n_heads: int = 0,
        conditioning: dict[str, int] | None = None,
        blind: bool = False,
    ):
        """conditioning: name -> width, each with a projection of its own; blind: all read as zero."""
        super().__init__()
        self.d_model, self.n_heads, self.chunk_size = d_model, n_heads, chunk_size
        self.conditioning, self.blind = dict(conditioning or {}), blind
        self.read = nn.Linear(2 * d_model, d_control)
        self.write = nn.Linear(d_control, d_control)
        self.prior = nn.Parameter(torch.zeros(d_control))
        self.informs, self.hints = nn.ModuleDict(), nn.ModuleDict()
        for name, width in self.conditioning.items():
            self.informs[name] = nn.Linear(width, d_control, bias=False)  # read's columns for it
            self.hints[name] = hint = nn.Linear(width, d_control, bias=False)
            nn.init.zeros_(hint.weight)
        self.width = d_model + 2 * n_heads  # features per token

    def decide(
        self,
        members: Sequence[Any],
        pooled: Pooled,
        turns: Tensor | None,
        conditioning: dict[str, Tensor],
        route: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        code = self.code(pooled, conditioning, dtype)
        return torch.cat([member.control(code) for member in members], -1)

    def code(
        self, pooled: Pooled, conditioning: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Code:
        """The code of every chunk that begins in the piece: slots 1, 2, ..."""
        sums, count = pooled.sums[:, :-1], pooled.count[:, :-1]
        all_sums = pooled.before.done_sums[:, None] + sums.cumsum(1)
        all_count = pooled.before.done_count[:, None] + count.cumsum(1)
        last = sums / count.clamp(min=1)[..., None]
        past = all_sums / all_count.clamp(min=1)[..., None]
        seen = (all_count > 0)[..., None]
        d = self.d_model
        read = torch.cat([_scale(last[..., :d]), _scale(past[..., :d])], -1)
        z = torch.where(seen, self._mlp(read, conditioning), self._first(conditioning))
        heads = torch.where(seen, self._head_statistics(last), 0.0) if self.n_heads else None
        return Code(
            z=on_grid(z, CODE_GRID),
            heads=None if heads is None else on_grid(heads, HEAD_GRID),
            number=pooled.number[:, 1:],
            real=pooled.count[:, 1:] > 0,
            conditioning=conditioning,
            dtype=dtype,
        )

    def _mlp(self, x: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        hidden = linear64(self.read, x)
        for name, value in conditioning.items():
            hidden = hidden + linear64(self.informs[name], value)  # type: ignore[arg-type]
        return linear64(self.write, F.gelu(hidden))

    def _first(self, conditioning: dict[str, Tensor]) -> Tensor:
        prior = self.prior.double()
        for name, value in conditioning.items():
            prior = prior + linear64(self.hints[name], value)  # type: ignore[arg-type]
        return prior

    def _head_statistics(self, mean: Tensor) -> Tensor:
        """log energy and relative spread of each head over a chunk, (..., 2 * n_heads)."""
        energy, square = mean[..., self.d_model :].chunk(2, -1)
        energy = energy.clamp(min=1e-12)
        spread = (square - energy.square()).clamp(min=0.0).sqrt() / energy
        return torch.cat([energy.log() / 10, spread / 10], -1)

    def flops_per_chunk(self) -> int:
        """Matrix FLOPs for one chunk slot."""
        layers = [self.read, self.write, *self.informs.values(), *self.hints.values()]
        return 2 * sum(layer.weight.numel() for layer in layers)  # type: ignore[union-attr,operator]


def on_grid(x: Tensor, steps: int) -> Tensor:
    """The nearest multiple of 1 / steps; gradients pass as if nothing had happened."""
    rounded = (x.detach() * steps).round() / steps
    return rounded + (x - x.detach()) if x.requires_grad else rounded


def token_features(
    hidden: Float[Tensor, "batch tokens d_model"],
    head_input: Float[Tensor, "batch tokens d_attn"] | None,
    n_heads: int,
) -> Float[Tensor, "batch tokens width"]:
    """Float32 features of each token: d_model + 2 * n_heads numbers.

    Args:
        hidden: hidden states entering the router layer.
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


def _scale(x: Tensor) -> Tensor:
    """Layer norm without weights: hidden states of any model come at one scale."""
    return F.layer_norm(x, x.shape[-1:])
