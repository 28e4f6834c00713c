"""Trust region: norms of a controlled low-rank update, without ever forming it.

For an update U diag(c) V with c constant in a chunk,

    ||U diag(c) V||_F^2 = c^T [(U^T U) * (V V^T)] c        (* elementwise; exact, R^2 work per chunk)
    sigma_1(U diag(c) V) = sigma_1(R_u diag(c) R_v^T)      (U = Q_u R_u, V^T = Q_v R_v; R x R)

The Gram matrix and the triangular factors depend on the weights alone, so at inference they are
computed once per set of weights. The projection onto a norm ball scales radially, which for the
Frobenius norm is the nearest point (Parikh & Boyd, "Proximal Algorithms", 2014).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def gram(u: Tensor, v: Tensor) -> Tensor:
    """(U^T U) * (V V^T) in float32: (out, R), (R, in) -> (R, R)."""
    u, v = u.float(), v.float()
    return (u.t() @ u) * (v @ v.t())


class GramCache:
    """The Gram matrix of a site, computed anew only when a weight changed or a gradient is wanted."""

    def __init__(self) -> None:
        self._key: tuple[int, ...] = ()
        self._matrix: Tensor | None = None

    def __call__(
        self, u: Tensor, v: Tensor, rows: Callable[[Tensor], Tensor] = lambda v: v
    ) -> Tensor:
        """Gram matrix of U and rows(V), where `rows` writes V as one (R, in) matrix."""
        if torch.is_grad_enabled():
            return gram(u, rows(v))
        key = (u.data_ptr(), u._version, v.data_ptr(), v._version)
        if self._matrix is None or key != self._key:
            self._key, self._matrix = key, gram(u, rows(v))
        return self._matrix


def low_rank_norm(u: Tensor, v: Tensor) -> Tensor:
    """||U V||_F as a scalar tensor."""
    return gram(u, v).sum().clamp(min=0.0).sqrt()


def controlled_norm(matrix: Tensor, c: Tensor) -> Tensor:
    """||U diag(c) V||_F for each control: Gram (R, R), c (..., R) -> (...)."""
    squared = ((c @ matrix) * c).sum(-1)
    return squared.clamp(min=1e-30).sqrt()  # rounding may leave it just below zero


def into_ball(matrix: Tensor, c: Tensor, radius: float) -> Tensor:
    """Scale each control so that its update lies inside the Frobenius ball of `radius`.

    Args:
        matrix: Gram matrix of the site (R, R), see `gram`.
        c: controls (..., R).
        radius: largest norm, in the units of the weights; must be > 0.
    Raises:
        ValueError: radius is not positive.
    """
    if not radius > 0:
        raise ValueError(f"radius must be > 0, got {radius}. To drop an update, do not attach it.")
    return c * (radius / controlled_norm(matrix, c)).clamp(max=1.0)[..., None]


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
        self._r_u = torch.linalg.qr(u.detach().double(), mode="r").R
        self._r_v = torch.linalg.qr(v.detach().double().t(), mode="r").R

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
