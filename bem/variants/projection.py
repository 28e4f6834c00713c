"""Trust region: norms of a controlled low-rank update, without ever forming it.

For an update U diag(c) V with c constant in a chunk,

    ||U diag(c) V||_F^2 = c^T [(U^T U) * (V V^T)] c        (* elementwise; exact, R^2 work per chunk)
    sigma_1(U diag(c) V) = sigma_1(R_u diag(c) R_v^T)      (U = Q_u R_u, V^T = Q_v R_v; R x R)

The Gram matrix and the triangular factors depend on the weights alone, so at inference they are
computed once per set of weights. The projection onto a norm ball scales radially, which for the
Frobenius norm is the nearest point (Parikh & Boyd, "Proximal Algorithms", 2014); for the spectral
norm it keeps the direction, where the nearest point would clip each singular value on its own.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bem.variants.watch import Watch

Norm = Literal["frobenius", "spectral"]
# Rounding of c to float32 (2^-24 of each rank's own norm) and of the squared norm, whose root is
# worst where ranks cancel: the square root of 10^4 float64 roundings. Both lie below this.
SLACK = 1e-6
SETS_KEPT = 64  # sets of columns whose factors are remembered


def gram(u: Tensor, v: Tensor) -> Tensor:
    """(U^T U) * (V V^T) in float64: (out, R), (R, in) -> (R, R)."""
    u, v = u.double(), v.double()
    return (u.t() @ u) * (v @ v.t())


def low_rank_norm(u: Tensor, v: Tensor) -> Tensor:
    """||U V||_F as a scalar tensor."""
    return gram(u, v).sum().clamp(min=0.0).sqrt()


class Ball:
    """A norm ball around zero for the update U diag(c) V of one site."""

    def __init__(self, radius: float, norm: Norm = "frobenius"):
        """radius: in the units of the weights; must be > 0.

        Raises:
            ValueError: radius is not positive.
        """
        if not radius > 0:
            raise ValueError(
                f"radius must be > 0, got {radius}. To drop an update, do not attach it."
            )
        self.radius, self.norm, self.cache = radius, norm, NormCache()

    def __call__(self, u: Tensor, v: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
        """Controls scaled inside the ball; the scale counts as a constant.

        Args:
            u, v: (out, R), (R, in).
            c: float64 (..., R).
            dtype: in which the update will be computed.
        """
        flat = c.reshape(-1, c.shape[-1])
        columns = torch.arange(c.shape[-1], device=c.device)
        bound = self.cache.bound(u, v, columns, "all", flat, self.norm)
        return (flat * scale_into_ball(bound, self.radius)[:, None]).view(c.shape)


def triangular(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(R_u, R_v) of U = Q_u R_u and V^T = Q_v R_v, in float64."""
    return (
        torch.linalg.qr(u.double(), mode="r").R,
        torch.linalg.qr(v.double().t(), mode="r").R,
    )


def spectral_norm(r_u: Tensor, r_v: Tensor, c: Tensor) -> Tensor:
    """sigma_1(U diag(c) V) for each control: triangular factors, c (..., R) float64 -> (...)."""
    return torch.linalg.matrix_norm((r_u * c[..., None, :]) @ r_v.t(), ord=2)


class NormCache:
    """Norms of U diag(c) V for controls that use only some ranks, never underestimated.

    What depends on the weights alone is kept for each set of ranks until a weight changes.
    """

    def __init__(self) -> None:
        self._weights = Watch()
        self._factors: dict[Hashable, tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def bound(
        self, u: Tensor, v: Tensor, columns: Tensor, name: Hashable, c: Tensor, norm: Norm
    ) -> Tensor:
        """The norm for each control, plus what rounding c to float32 may add.

        Args:
            u, v: (out, R), (R, in).
            columns: the n ranks that c speaks of; `name` stands for them in the cache.
            c: float64 (rows, n).
        """
        factors = self._factors_of(u, v, columns, name, norm)
        c, own = c.detach(), factors[-1]
        if norm == "frobenius":
            value = ((c @ factors[0]) * c).sum(-1).clamp(min=0.0).sqrt()
        else:
            value = spectral_norm(factors[0], factors[1], c)
        return value + SLACK * (c.abs() @ own)

    def _factors_of(
        self, u: Tensor, v: Tensor, columns: Tensor, name: Hashable, norm: Norm
    ) -> tuple[Tensor, ...]:
        if self._weights.changed(u, v):
            self._factors = {}
        if (name, norm) not in self._factors:
            if len(self._factors) >= SETS_KEPT:
                del self._factors[next(iter(self._factors))]
            self._factors[name, norm] = _factors(u[:, columns], v[columns], norm)
        return self._factors[name, norm]


def _factors(u: Tensor, v: Tensor, norm: Norm) -> tuple[Tensor, ...]:
    """What a norm needs of the weights, and last ||u_i|| ||v_i|| of each rank."""
    u, v = u.double(), v.double()
    own = u.norm(dim=0) * v.norm(dim=1)
    if norm == "frobenius":
        return (u.t() @ u) * (v @ v.t()), own
    return *triangular(u, v), own


def scale_into_ball(bound: Tensor, radius: float) -> Tensor:
    """Largest factor of at most 1 that brings norms <= bound inside the ball, rounded down.

    Ten significant bits: multiples of 1/1024 from a half to one, finer below, so that a huge update is
    shrunk and not dropped. Rounding down keeps the norm inside; the billionth that comes off first
    moves round numbers away from the steps, where the last bit of a norm, which depends on the shape
    of the batch, would decide.

    Args:
        bound: float64 (...), not negative.
        radius: > 0, in the units of the weights.
    """
    scale = (radius * (1 - 1e-9) / bound).clamp(max=1.0)  # bound 0: infinity, so 1
    return (scale.view(torch.int64) >> 43 << 43).view(torch.float64)  # keep 9 of 52 stored bits


@dataclass(frozen=True)
class Spectrum:
    """Largest singular value and Frobenius norm of one update."""

    sigma: float
    frobenius: float


class SpectralMonitor:
    """Reports the norms of a low-rank site's update for any control, from factors kept once.

    QR costs (in + out) R^2 when the weights change; every later control costs R^3.
    """

    def __init__(self, u: Tensor, v: Tensor):
        self._r_u, self._r_v = triangular(u.detach(), v.detach())

    def spectrum(self, c: Tensor) -> Spectrum:
        """Norms of U diag(c) V for one control c (R,).

        Raises:
            ValueError: c holds NaN or inf, that is, the controller diverged.
        """
        if not torch.isfinite(c).all():
            raise ValueError(
                f"control holds {int((~torch.isfinite(c)).sum())} non-finite values: diverged."
            )
        core = self._r_u * c.double() @ self._r_v.t()
        values = torch.linalg.svdvals(core)
        return Spectrum(float(values[0]), float(values.square().sum().sqrt()))
