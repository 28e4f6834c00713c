"""PT1: head-group gates on the attention output projection; V1: with a dynamic rank mask; V2: with evidence.

Both are one primitive, y = W x + s * U (c * V x): the gate of a head group is a block of c whose
rows of V see only that group's heads; a rank mask is a k-hot c.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bem.variants.base import Adapter, Code, Flops
from bem.variants.gate_shaping import margin_alignment
from bem.variants.projection import GramCache, into_ball
from bem.variants.rank_mask import RankMask


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
        groups: int,
        d_control: int,
        n_heads: int,
        mask: RankMask | None = None,
        radius: float | None = None,
        decorrelation: float = 0.0,
        n_evidence: int = 0,
        alignment: float = 0.0,
        margin_scale: float = 2.0,
    ):
        """rank is split evenly over `groups`; alpha / rank scales the update; see `AdapterConfig`."""
        super().__init__()
        if rank % groups or d_in % groups:
            raise ValueError(
                f"{groups} head groups must divide rank {rank} and input width {d_in}."
            )
        self.v = nn.Parameter(torch.empty(groups, d_in // groups, rank // groups))
        bound = (groups / d_in) ** 0.5  # as LoRA's V, for the inputs that a group sees
        nn.init.uniform_(self.v, -bound, bound)
        self.u = nn.Parameter(torch.zeros(d_out, rank))  # zero: attaching changes nothing
        self.gate = nn.Linear(d_control + 2 * n_heads + n_evidence, groups)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)  # 2 sigmoid(0) = 1
        self.mask = mask
        self.groups, self.rank, self.scale = groups, rank, alpha / rank
        self.radius, self.decorrelation = radius, decorrelation
        self.n_evidence, self.alignment, self.margin_scale = n_evidence, alignment, margin_scale
        self.gram = GramCache()
        self.control_width = rank
        self._seen: tuple[Tensor, Code] | None = None  # gates of the last pass, for the penalty

    def control(self, code: Code) -> Tensor:
        assert code.heads is not None, "the controller must hand over head statistics"
        read = [code.z, code.heads]
        if self.n_evidence:
            assert code.evidence is not None, "the controller must hand over evidence"
            read.append(code.evidence)
        gates = 2 * torch.sigmoid(self.gate(torch.cat(read, -1)))
        judged = self.training and (self.decorrelation or self.alignment)
        self._seen = (gates, code) if judged else None
        c = self.scale * gates.repeat_interleave(self.rank // self.groups, -1)
        if self.mask is not None:
            c = c * self.mask(code)
        if self.radius is None:
            return c
        return into_ball(self.gram(self.u, self.v, self._dense_v), c, self.radius)

    def update(self, y: Tensor, x: Tensor, control: Tensor | None) -> Tensor:
        assert control is not None
        v = self.v.to(x.dtype)
        if x.numel() == x.shape[-1]:  # one decoded token: its slices are a batch as they lie
            h = torch.bmm(x.reshape(self.groups, 1, -1), v).view(*x.shape[:-1], self.rank)
        else:  # V_g^T x_g^T for all tokens: twice as fast as x_g V_g, whose result is too thin
            slices = x.reshape(-1, *v.shape[:2]).permute(1, 2, 0)
            h = torch.bmm(v.mT, slices).view(self.rank, -1).t().view(*x.shape[:-1], self.rank)
        return y + F.linear(h * control, self.u.to(x.dtype))

    def flops(self) -> Flops:
        head = 2 * self.gate.weight.numel() + (self.mask.flops() if self.mask is not None else 0)
        trust = 2 * self.rank**2 if self.radius is not None else 0
        return Flops(2 * (self.v.numel() + self.u.numel()), per_chunk=head + trust)

    def magnitude(self, control: Tensor) -> Tensor:
        """Mean gate over the ranks, (...), of a control (..., rank)."""
        return control.mean(-1) / self.scale

    def penalty(self) -> Tensor | None:
        """Weighted: correlation between the gates, and their distance from the evidence's margin."""
        if self._seen is None:
            return None
        gates, code = self._seen
        found = [self._correlation(gates)] if self.decorrelation else []
        if self.alignment and code.evidence is not None and code.real is not None:
            error = margin_alignment(gates, code.evidence, code.real, self.margin_scale)
            found.append(None if error is None else self.alignment * error)
        parts = [p for p in found if p is not None]
        return torch.stack(parts).sum() if parts else None

    def _correlation(self, gates: Tensor) -> Tensor | None:
        """Mean squared correlation between the gates of different groups over the chunks seen."""
        if gates[..., 0].numel() < 3:
            return None
        centred = gates.flatten(0, -2)
        centred = F.normalize(centred - centred.mean(0), dim=0, eps=1e-6)
        correlation = centred.t() @ centred
        off = correlation - torch.diag(correlation.diagonal())
        return self.decorrelation * off.square().sum() / max(1, self.groups * (self.groups - 1))

    @staticmethod
    def _dense_v(v: Tensor) -> Tensor:
        """V as one (rank, d_in) matrix, zero where a group's rows do not see an input."""
        return torch.block_diag(*v.transpose(1, 2))
