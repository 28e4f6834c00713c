"""V4: residual FiLM, h <- gamma * h + beta on the output of a decoder block (arXiv:1709.07871)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bem.variants.base import Code, Flops, Update, linear64
from bem.variants.forbidden import Forbidden


class ResidualFiLMModule(nn.Module):
    """Modulates the residual stream by gamma and beta, functions of the controller's code.

    narrow: gamma = 1 + 0.2 tanh(.), beta = 0.1 tanh(.)
    wide:   gamma in [0.5, 2] (2 ** tanh(.)), beta = 0.5 tanh(.)
    Both are exactly (1, 0) at start.
    """

    def __init__(
        self, d_model: int, d_control: int, film_range: Literal["narrow", "wide"] = "narrow"
    ):
        super().__init__()
        self.head = nn.Linear(d_control, 2 * d_model)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.wide = film_range == "wide"
        self.forbidden: Forbidden | None = None
        self.control_width = 2 * d_model

    def control(self, code: Code) -> Tensor:
        """gamma - 1 and beta, side by side: (batch, chunks, 2 * d_model)."""
        gamma, beta = torch.tanh(linear64(self.head, code.z)).chunk(2, -1)
        if self.wide:
            return torch.cat([torch.exp2(gamma) - 1, 0.5 * beta], -1)
        return torch.cat([0.2 * gamma, 0.1 * beta], -1)

    def protect(self, forbidden: Forbidden | None) -> None:
        """Change none of these directions of the residual stream from now on: h + (I - P P^T)((gamma - 1) h +
        beta)."""
        self.forbidden = forbidden

    def modulate(self, h: Tensor, control: Tensor, slot: Tensor | None) -> Tensor:
        """h + (gamma - 1) h + beta.

        Args:
            h: (batch, tokens, d_model).
            control: table (rows, 2 * d_model) in the dtype of h.
            slot: row of each token, see `masked_low_rank`.
        """
        spread = control if slot is None else control.index_select(0, slot)
        spread = spread.view(
            *(h.shape[:-1] if len(spread) > 1 or h.numel() == h.shape[-1] else (1, 1)), -1
        )
        return self._modulated(h, *spread.chunk(2, -1))

    def ready(self, dtype: torch.dtype, rows: int) -> Update:
        """`modulate` for one decoded token of so many rows; see `Adapter.ready`."""
        held: list[Tensor] = []  # a control, and its halves: the same for every token of a chunk

        def modulate(h: Tensor, control: Tensor, slot: Tensor | None) -> Tensor:
            if not held or held[0] is not control:
                held[:] = [control, *control.view(rows, 1, -1).chunk(2, -1)]
            return self._modulated(h, held[1], held[2])

        return modulate

    def _modulated(self, h: Tensor, gamma_less_one: Tensor, beta: Tensor) -> Tensor:
        if self.forbidden is None:
            return torch.addcmul(h + beta, gamma_less_one, h)
        return h + self.forbidden.without(torch.addcmul(beta, gamma_less_one, h))

    def flops(self) -> Flops:
        return Flops(per_chunk=2 * self.head.weight.numel())
