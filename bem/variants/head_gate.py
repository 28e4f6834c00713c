"""PT1: head-group gates on the attention output projection; V1: with a dynamic rank mask; V2: with evidence.

Both are one primitive, y = W x + s * U (c * V x): the gate of a head group is a block of c whose
rows of V see only that group's heads; a rank mask is a k-hot c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bem.kernels.reference import FEW_ROWS, few_grouped, masked_low_rank
from bem.variants.base import Adapter, Code, Flops, Update, linear64
from bem.variants.gate_shaping import margin_alignment
from bem.variants.low_rank import ready_low_rank
from bem.variants.projection import Ball, norm_flops
from bem.variants.rank_mask import RankMask
from bem.variants.watch import ComputeCopies


@dataclass(frozen=True)
class Gating:
    """Sizes of the gates' head, and what draws on it while it trains."""

    groups: int
    d_control: int
    n_heads: int
    n_evidence: int = 0
    decorrelation: float = 0.0
    """Weight of the penalty on the correlation between gates."""
    alignment: float = 0.0
    """Weight of (mean gate - margin_scale * margin of the evidence)^2."""
    margin_scale: float = 2.0


class HeadGate(Adapter):
    """Adds s * sum_g gate_g * U_g V_g x_g, where V_g reads only head group g's slice of x.

    gate_g = 2 sigmoid(head(z, head statistics of the last chunk)); 1 at start. With `mask`, each
    chunk also keeps only k of the R ranks (V1). With `n_evidence`, the gates also read the evidence,
    and `penalty` aligns their magnitude with its margin (V2).
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        alpha: float,
        gating: Gating,
        mask: RankMask | None = None,
        radius: float | None = None,
    ):
        """rank is split evenly over the groups; alpha / rank scales the update; see `AdapterConfig`."""
        super().__init__()
        groups = gating.groups
        if rank % groups or d_in % groups:
            raise ValueError(
                f"{groups} head groups must divide rank {rank} and input width {d_in}."
            )
        self.v = nn.Parameter(torch.empty(groups, rank // groups, d_in // groups))
        bound = (groups / d_in) ** 0.5  # as LoRA's V, for the inputs that a group sees
        nn.init.uniform_(self.v, -bound, bound)
        self.u = nn.Parameter(torch.zeros(d_out, rank))  # zero: attaching changes nothing
        width = gating.d_control + 2 * gating.n_heads + gating.n_evidence
        self.gate = nn.Linear(width, groups)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)  # 2 sigmoid(0) = 1
        self.mask, self.gating = mask, gating
        self.rank, self.scale = rank, alpha / rank
        self.ball = None if radius is None else Ball(radius)
        self.control_width = rank
        self._cast = ComputeCopies()
        self._seen: tuple[Tensor, Code] | None = None  # gates of the last pass, for the penalty

    def control(self, code: Code) -> Tensor:
        gates = 2 * torch.sigmoid(linear64(self.gate, self._read(code)))
        judged = self.training and (self.gating.decorrelation or self.gating.alignment)
        self._seen = (gates, code) if judged else None
        c = self.scale * gates.repeat_interleave(self.rank // self.gating.groups, -1)
        if self.mask is not None:
            c = c * self.mask(code)
        return c if self.ball is None else self.ball(self.u, self.v, c, code.dtype)

    def _read(self, code: Code) -> Tensor:
        """What the gates are made from (batch, chunks, width)."""
        assert code.heads is not None, "the controller must hand over head statistics"
        parts = [code.z, code.heads]
        if self.gating.n_evidence:
            parts.append(code.conditioning["evidence"])
        return torch.cat([p.double() for p in parts], -1)

    def writers(self) -> tuple[Tensor, ...]:
        return (self.u,)

    def update(self, y: Tensor, x: Tensor, control: Tensor | None, slot: Tensor | None) -> Tensor:
        assert control is not None
        v, u = self._cast(x.dtype, self.v, self.u)
        return masked_low_rank(y, x, v, control, slot, u)

    def ready(self, dtype: torch.dtype, rows: int) -> Update:
        v, u = self._cast(dtype, self.v, self.u)
        usual = ready_low_rank(v, u, dtype)
        return usual if rows > FEW_ROWS else _ready_few(v, u, usual)

    def flops(self) -> Flops:
        head = 2 * self.gate.weight.numel() + (self.mask.flops() if self.mask is not None else 0)
        trust = norm_flops(self.ball.norm, self.rank) if self.ball is not None else 0
        return Flops(2 * (self.v.numel() + self.u.numel()), per_chunk=head + trust)

    def magnitude(self, control: Tensor) -> Tensor:
        """Mean gate over the ranks, (...), of a control (..., rank)."""
        return control.mean(-1) / self.scale

    def penalty(self) -> Tensor | None:
        """Weighted: correlation between the gates, and their distance from the evidence's margin."""
        if self._seen is None:
            return None
        (gates, code), gating = self._seen, self.gating
        terms = [self._correlation(gates[code.real])] if gating.decorrelation else []
        if gating.alignment and "evidence" in code.conditioning:
            evidence = code.conditioning["evidence"]
            error = margin_alignment(gates, evidence, code.real, gating.margin_scale)
            terms.append(None if error is None else gating.alignment * error)
        parts = [t for t in terms if t is not None]
        return torch.stack(parts).sum().float() if parts else None

    def _correlation(self, gates: Tensor) -> Tensor | None:
        """Mean squared correlation between the gates (chunks, groups) of different groups."""
        if len(gates) < 3:
            return None
        groups = self.gating.groups
        centred = F.normalize(gates - gates.mean(0), dim=0, eps=1e-6)
        correlation = centred.t() @ centred
        off = correlation - torch.diag(correlation.diagonal())
        return self.gating.decorrelation * off.square().sum() / max(1, groups * (groups - 1))


def _ready_few(v: Tensor, u: Tensor, otherwise: Update) -> Update:
    """`few_grouped` with these weights; `otherwise` for an input of another dtype."""
    v, u = v.detach().mT, u.detach()
    dtype = v.dtype

    def update(y: Tensor, x: Tensor, control: Tensor | None, slot: Tensor | None) -> Tensor:
        if x.dtype != dtype or control is None:
            return otherwise(y, x, control, slot)
        return few_grouped(y, x, v, control, u)

    return update
