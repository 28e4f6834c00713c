"""V3: a sum of Kronecker products at the MLP down projection, applied without forming it.

Delta W = sum_t A_t (x) B_t with A_t (a1, a2), B_t (b1, b2), a1 b1 = d_out, a2 b2 = d_in, each the
most square factor pair (KronA, arXiv:2212.10650); applied by `kernels.reference.kronecker`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bem.kernels.reference import kronecker
from bem.variants.base import Adapter, Flops
from bem.variants.watch import ComputeCopies


class KroneckerFactorization(Adapter):
    """Adds s * sum_t (A_t (x) B_t) x to a frozen linear layer; static.

    sigma_1(A (x) B) = sigma_1(A) sigma_1(B); for the sum it is found by power iteration on the
    factored operator and held below `spectral_cap` after every step.
    """

    probe: Tensor  # where the last power iteration ended

    def __init__(
        self, d_in: int, d_out: int, terms: int, scale: float, spectral_cap: float | None = None
    ):
        super().__init__()
        (self.a1, self.b1), (self.a2, self.b2) = square_factors(d_out), square_factors(d_in)
        self.a = nn.Parameter(
            torch.zeros(terms, self.a1, self.a2)
        )  # zero: attaching changes nothing
        self.b = nn.Parameter(torch.randn(terms, self.b1, self.b2) / self.b2**0.5)
        self.rank = terms
        self.terms, self.scale, self.spectral_cap = terms, scale, spectral_cap
        self.d_in, self.d_out = d_in, d_out
        self.register_buffer("probe", torch.randn(d_in) / d_in**0.5, persistent=False)
        self._cast = ComputeCopies()

    def update(self, y: Tensor, x: Tensor, control: Tensor | None, slot: Tensor | None) -> Tensor:
        a, b = self._cast(x.dtype, self.a, self.b)
        if self.forbidden is None:
            return kronecker(y, x, a, b, self.scale)
        # (I - P P^T) of a sum of Kronecker products is none: projected as it is applied
        return y + self.forbidden.without(kronecker(torch.zeros_like(y), x, a, b, self.scale))

    def writers(self) -> tuple[Tensor, ...]:
        return ()

    def flops(self) -> Flops:
        first = self.a1 * self.a2 * self.terms * self.b2
        second = self.a1 * self.b2 * self.terms * self.b1
        return Flops(per_token=2 * (first + second))

    @torch.no_grad()
    def sigma(self, tolerance: float = 1e-4, iterations: int = 200) -> float:
        """Largest singular value of the scaled update, by power iteration from the last answer.

        A tenth of a random direction is mixed in: an iteration that starts exactly where the largest
        direction was never leaves it when another one outgrows it.
        """
        if not self.a.any():
            return 0.0
        a, b = self.a.double(), self.b.double()
        generator = torch.Generator().manual_seed(self.d_in)
        fresh = torch.randn(self.d_in, generator=generator, dtype=torch.float64, device="cpu").to(
            a.device
        )
        x, last, sigma = self.probe.double() + 0.1 * fresh / self.d_in**0.5, 0.0, 0.0
        zero = a.new_zeros(self.d_out)
        for _ in range(iterations):
            y = kronecker(zero, x, a, b, 1.0)
            x = torch.einsum("tij,ik,tkl->jl", a, y.view(self.a1, self.b1), b).reshape(-1)
            sigma = float(x.norm() / y.norm().clamp(min=1e-30))
            x = x / x.norm().clamp(min=1e-30)
            if abs(sigma - last) <= tolerance * sigma:
                break
            last = sigma
        self.probe.copy_(x)
        return self.scale * sigma

    @torch.no_grad()
    def after_step(self) -> None:
        """Scale A back if the update's largest singular value left the cap."""
        if self.spectral_cap is not None and (sigma := self.sigma()) > self.spectral_cap:
            self.a.mul_(self.spectral_cap / sigma)


def square_factors(n: int) -> tuple[int, int]:
    """The most square pair (p, q) with p * q = n and p <= q."""
    p = next(p for p in range(int(n**0.5), 0, -1) if n % p == 0)
    return p, n // p
