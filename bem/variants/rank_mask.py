"""The dynamic rank mask of V1: which k of R ranks act, chosen anew for every chunk."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bem.kernels.reference import masked_low_rank
from bem.variants.base import Adapter, Code, Flops, Update, linear64
from bem.variants.low_rank import ready_low_rank
from bem.variants.projection import Ball, norm_flops
from bem.variants.watch import ComputeCopies

RANDOM_PERIOD = 64  # the random control repeats after this many chunks


class RankMask(nn.Module):
    """A k-hot vector over R ranks for each chunk, exactly k.

    learned: the k largest scores(z). Training adds Gumbel noise (Gumbel top-k, arXiv:1903.06059)
        and passes gradients straight through to sigmoid((score - threshold) / temperature), the
        threshold halfway between the k-th and the next score (straight-through: arXiv:1308.3432).
    random: another k for every chunk number, the same in every run and sequence. A control.
    fixed: the first k, always. A control.
    """

    table: Tensor  # of the controls: one mask per chunk number

    def __init__(
        self,
        rank: int,
        k: int,
        d_control: int,
        kind: Literal["learned", "random", "fixed"] = "learned",
        temperature: float = 1.0,
    ):
        super().__init__()
        if not 1 <= k <= rank:
            raise ValueError(f"k_active {k} must lie in 1..rank ({rank}).")
        self.rank, self.k, self.kind, self.temperature = rank, k, kind, temperature
        self.scores = nn.Linear(d_control, rank) if kind == "learned" else None
        if kind != "learned":
            order = torch.arange(rank).expand(RANDOM_PERIOD, rank)
            if kind == "random":
                order = torch.stack([torch.randperm(rank) for _ in range(RANDOM_PERIOD)])
            table = torch.zeros(RANDOM_PERIOD, rank).scatter_(1, order[:, :k], 1.0)
            self.register_buffer("table", table)

    def forward(self, code: Code) -> Tensor:
        """(batch, chunks, rank), k ones each."""
        if self.scores is None:
            return self.table[code.number % RANDOM_PERIOD].double()
        scores = linear64(self.scores, code.z)
        if not self.training:
            return torch.zeros_like(scores).scatter_(-1, scores.topk(self.k).indices, 1.0)
        noise = -torch.log(-torch.log(torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)))
        return _straight_through(scores + noise * self.temperature, self.k, self.temperature)

    def flops(self) -> int:
        """Matrix FLOPs per chunk."""
        return 2 * self.scores.weight.numel() if self.scores is not None else 0


class MaskedLowRank(Adapter):
    """Adds s * U (mask * V x): V1 at a site without heads, the MLP down projection."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        alpha: float,
        mask: RankMask,
        radius: float | None = None,
    ):
        super().__init__()
        self.v = nn.Parameter(torch.empty(rank, d_in))
        nn.init.kaiming_uniform_(self.v, a=5**0.5)
        self.u = nn.Parameter(torch.zeros(d_out, rank))  # zero: attaching changes nothing
        self.mask = mask
        self.rank, self.scale = rank, alpha / rank
        self.ball = None if radius is None else Ball(radius)
        self.control_width = rank
        self._cast = ComputeCopies()

    def control(self, code: Code) -> Tensor:
        c = self.scale * self.mask(code)
        return c if self.ball is None else self.ball(self.u, self.v, c, code.dtype)

    def writers(self) -> tuple[Tensor, ...]:
        return (self.u,)

    def update(self, y: Tensor, x: Tensor, control: Tensor | None, slot: Tensor | None) -> Tensor:
        assert control is not None
        v, u = self._cast(x.dtype, self.v, self.u)
        return masked_low_rank(y, x, v, control, slot, u)

    def ready(self, dtype: torch.dtype, rows: int) -> Update:
        v, u = self._cast(dtype, self.v, self.u)
        return ready_low_rank(v, u, dtype)

    def flops(self) -> Flops:
        trust = norm_flops(self.ball.norm, self.control_width) if self.ball else 0
        return Flops(2 * (self.v.numel() + self.u.numel()), self.mask.flops() + trust)


def _straight_through(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Hard k-hot forward, gradient of the relaxed mask backward."""
    top = scores.topk(min(k + 1, scores.shape[-1]))
    hard = torch.zeros_like(scores).scatter_(-1, top.indices[..., :k], 1.0)
    threshold = top.values[..., k - 1 :].mean(-1, keepdim=True).detach()
    soft = torch.sigmoid((scores - threshold) / temperature)
    return hard + (soft - soft.detach())  # in this order exactly `hard`, whatever the rounding
