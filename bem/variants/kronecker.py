"""V3: a sum of Kronecker products at the MLP down projection, applied without forming it.

Delta W = sum_t A_t (x) B_t with A_t (a1, a2), B_t (b1, b2), a1 b1 = d_out, a2 b2 = d_in, each the
most square factor pair. For x read row by row as X (a2, b2), (A (x) B) x = vec_r(A X B^T)
(Van Loan, "The ubiquitous Kronecker product", 2000; KronA, arXiv:2212.10650).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bem.variants.base import Adapter, Flops


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
        self.terms, self.scale, self.spectral_cap = terms, scale, spectral_cap
        self.d_in, self.d_out = d_in, d_out
        self.register_buffer("probe", torch.randn(d_in) / d_in**0.5, persistent=False)

    def update(self, y: Tensor, x: Tensor, control: Tensor | None) -> Tensor:
        left, b = self._factors(x)
        return torch.addmm(y.reshape(-1, self.b1), left, b, alpha=self.scale).view(y.shape)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two matrices whose product is the unscaled update of all rows of x.

        A_t X for all t side by side (rows * a1, terms * b2), and B_t^T below each other (terms * b2, b1).
        A comes first: where d_out < d_in that is the cheaper order, and the second product is one
        plain matrix product.
        """
        a = self.a.to(x.dtype).transpose(0, 1).reshape(self.a1 * self.terms, self.a2)
        b = self.b.to(x.dtype).transpose(1, 2).reshape(self.terms * self.b2, self.b1)
        rows = x.reshape(-1, self.a2, self.b2)
        left = torch.bmm(a.expand(len(rows), -1, -1), rows)  # (rows, a1 * terms, b2)
        return left.view(-1, self.terms * self.b2), b

    def flops(self) -> Flops:
        first = self.a1 * self.a2 * self.terms * self.b2
        second = self.a1 * self.b2 * self.terms * self.b1
        return Flops(per_token=2 * (first + second))

    @torch.no_grad()
    def sigma(self, tolerance: float = 1e-4, iterations: int = 200) -> float:
        """Largest singular value of the scaled update, by power iteration from the last answer."""
        if not self.a.any():
            return 0.0
        x, last = self.probe.to(self.a.dtype), 0.0
        for _ in range(iterations):
            left, b = self._factors(x)
            y = (left @ b).view(-1)
            x = self._transposed(y)
            sigma = float(x.norm() / y.norm().clamp(min=1e-30))
            x = x / x.norm().clamp(min=1e-30)
            if abs(sigma - last) <= tolerance * sigma:
                break
            last = sigma
        self.probe.copy_(x)
        return self.scale * sigma

    def _transposed(self, y: Tensor) -> Tensor:
        """Delta W^T y for one vector: sum_t A_t^T Y B_t."""
        return torch.einsum("tij,ik,tkl->jl", self.a, y.view(self.a1, self.b1), self.b).reshape(-1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Scale A back if the update's largest singular value left the cap."""
        if self.spectral_cap is not None and (sigma := self.sigma()) > self.spectral_cap:
            self.a.mul_(self.spectral_cap / sigma)


def square_factors(n: int) -> tuple[int, int]:
    """The most square pair (p, q) with p * q = n and p <= q."""
    p = next(p for p in range(int(n**0.5), 0, -1) if n % p == 0)
    return p, n // p
