"""S0: static LoRA, the baseline that every variant must beat at equal budget."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bem.kernels.reference import masked_low_rank
from bem.variants.base import Adapter, Flops, Update
from bem.variants.projection import low_rank_norm
from bem.variants.watch import ComputeCopies


class LowRank(Adapter):
    """Adds scale * U V x to a frozen linear layer, scale = alpha / rank (LoRA, arXiv:2106.09685).

    Equal to PEFT's LoRA with lora_A = V and lora_B = U, initialised as PEFT does it.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float, radius: float | None = None):
        """radius: largest Frobenius norm of the whole update, kept after every step; None: free."""
        super().__init__()
        self.v = nn.Parameter(torch.empty(rank, d_in))
        nn.init.kaiming_uniform_(self.v, a=5**0.5)
        self.u = nn.Parameter(torch.zeros(d_out, rank))  # zero: attaching changes nothing
        self.rank, self.scale = rank, alpha / rank
        self.radius = radius
        self._cast = ComputeCopies()

    def update(self, y: Tensor, x: Tensor, control: Tensor | None, slot: Tensor | None) -> Tensor:
        v, u = self._cast(x.dtype, self.v, self.u)
        return masked_low_rank(y, x, v, self.scale, None, u)

    def flops(self) -> Flops:
        return Flops(per_token=2 * (self.v.numel() + self.u.numel()))

    def writers(self) -> tuple[Tensor, ...]:
        return (self.u,)

    @torch.no_grad()
    def after_step(self) -> None:
        self.keep_out()
        if self.radius is not None:
            norm = self.scale * low_rank_norm(self.u, self.v)
            self.u.mul_((self.radius / norm).clamp(max=1.0))


def ready_low_rank(v: Tensor, u: Tensor, dtype: torch.dtype) -> Update:
    """`masked_low_rank` with these weights, which have this dtype; see `Adapter.ready`."""
    v, u = v.detach(), u.detach()

    def update(y: Tensor, x: Tensor, control: Tensor | None, slot: Tensor | None) -> Tensor:
        assert control is not None
        if x.dtype != dtype:  # a residual stream in float32, blocks that compute in bfloat16
            return masked_low_rank(y, x, v.to(x.dtype), control, slot, u.to(x.dtype))
        return masked_low_rank(y, x, v, control, slot, u)

    return update
