"""Trust region: norms of a controlled low-rank update, bounded without ever forming it.

For an update U diag(c) V with c constant in a chunk, G_u = U^T U and G_v = V V^T (R x R, float64),

    ||U diag(c) V||_F^2     = c^T [G_u * G_v] c                        (* elementwise; R^2 per chunk)
    sigma_1(U diag(c) V)^2  = lambda_max(L^T diag(c) G_u diag(c) L)    (G_v = L L^T; R^3 per chunk)
    lambda_max(M)          <= ||M^p||_F^(1/p)                          (p = 2^16: above it by R^(1/2p))

What the model adds is U diag(c) V in the dtype that computes, with c rounded to it. Both norms are
therefore bounded from above: the rounding of c moves the update by at most eps(dtype) * sum_i |c_i|
||u_i|| ||v_i||, and the float64 sums themselves are off by a known share of that sum squared. Nothing
here reads a number back to the host.

The projection onto a norm ball scales radially, which for the Frobenius norm is the nearest point
(Parikh & Boyd, "Proximal Algorithms", 2014); for the spectral norm it keeps the direction, where the
nearest point would clip each singular value on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bem.variants.watch import Watch

Norm = Literal["frobenius", "spectral"]
SQUARINGS = 16
UNIT = torch.finfo(torch.float64).eps / 2
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Grams:
    """What a norm of U diag(c) V needs of the weights, in float64. Rows of V count as unit vectors and
    their lengths as U's, so that a large row of one beside a small one of the other costs no digits."""

    norm: Norm
    matrices: tuple[Tensor, ...]
    """Frobenius: (G_u * G_v,), spectral: (G_u, G_v); each (..., R, R)."""
    sizes: Float[Tensor, "*sets R"]
    """||u_i|| ||v_i||, the norm of each rank alone."""
    widths: int
    """d_in + d_out: how many products each number is a sum of."""

    @property
    def error(self) -> float:
        """Of a squared norm: the float64 rounding, in units of (sum_i |c_i| sizes_i)^2."""
        ranks = self.sizes.shape[-1]
        return 4 * max(1, ranks) * (ranks + self.widths) * UNIT

    def select(self, columns: Int[Tensor, "sets n"]) -> Grams:
        """Those of the given ranks, one set of n ranks for each control."""
        down, across = columns[:, :, None], columns[:, None, :]
        chosen = tuple(matrix[down, across] for matrix in self.matrices)
        return replace(self, matrices=chosen, sizes=self.sizes[columns])


def grams(
    u: Float[Tensor, "out R"],
    v: Float[Tensor, "R in"] | Float[Tensor, "groups ranks part"],
    norm: Norm,
) -> Grams:
    """The Gram matrices of weights as they are; a V by groups (see `masked_low_rank`) stays so."""
    u, v = u.double(), v.double()
    d_in = v.shape[-1] * (len(v) if v.dim() == 3 else 1)
    lengths = v.norm(dim=-1)
    u, v = u * lengths.flatten(), v / lengths.clamp(min=TINY)[..., None]
    left, right = u.mT @ u, v @ v.mT
    if v.dim() == 3:
        right = torch.block_diag(*right)  # groups see different inputs
    matrices = (left * right,) if norm == "frobenius" else (left, right)
    return Grams(norm, matrices, u.norm(dim=0), len(u) + d_in)


def norm_bound(weights: Grams, c: Float[Tensor, "*chunks R"], eps: float) -> Tensor:
    """The norm of U diag(c) V for each control (...), never underestimated.

    Args:
        c: float64.
        eps: relative rounding that each c_i is still to undergo; 0: none.
    """
    total = (c.abs() * weights.sizes).sum(-1)
    if weights.norm == "frobenius":
        squared = ((c[..., None, :] @ weights.matrices[0])[..., 0, :] * c).sum(-1)
    else:
        squared = _largest_eigenvalue(weights, c, total.square())
    return (squared + weights.error * total.square()).clamp(min=TINY).sqrt() + eps * total


def _largest_eigenvalue(weights: Grams, c: Tensor, otherwise: Tensor) -> Tensor:
    """lambda_max(L^T diag(c) G_u diag(c) L) from above; `otherwise` where G_v has no factor L."""
    left, right = weights.matrices
    lift = weights.error * torch.eye(right.shape[-1], dtype=right.dtype, device=right.device)
    factor, info = torch.linalg.cholesky_ex(right + lift)
    power = factor.mT @ (c[..., :, None] * left * c[..., None, :]) @ factor
    size = power.square().sum((-2, -1)).clamp(min=TINY).sqrt()
    value = size
    for k in range(1, SQUARINGS + 1):
        power = power / size[..., None, None]
        power = power @ power
        size = power.square().sum((-2, -1)).clamp(min=TINY).sqrt()
        value = value * size.pow(0.5**k)  # ||M^(2^k)||^(1/2^k), factor by factor
    return torch.where(info > 0, otherwise, value)


def norm_flops(norm: Norm, rank: int) -> int:
    """Matrix FLOPs of the norm of one control."""
    return 2 * rank**2 if norm == "frobenius" else 2 * (2 + SQUARINGS) * rank**3


def low_rank_norm(
    u: Float[Tensor, "out R"], v: Float[Tensor, "R in"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, ""]:
    """||U V||_F in float64, never underestimated, whatever rounding U and V to `dtype` does."""
    ones = torch.ones(u.shape[1], dtype=torch.float64, device=u.device)
    return norm_bound(grams(u, v, "frobenius"), ones, 1.01 * torch.finfo(dtype).eps)


def into_ball(
    u: Float[Tensor, "out R"],
    v: Float[Tensor, "R in"] | Float[Tensor, "groups ranks part"],
    c: Float[Tensor, "*chunks R"],
    radius: float,
    norm: Norm = "frobenius",
    dtype: torch.dtype = torch.float32,
    cache: NormCache | None = None,
) -> Float[Tensor, "*chunks R"]:
    """Scale each control so that its update lies inside the norm ball of `radius` as it is applied:
    U and V cast to `dtype`, the control rounded to it once.

    Differentiable in c, and in U and V where they want a gradient.

    Args:
        u, v: V may be given by groups, see `masked_low_rank`.
        c: float64 controls.
        radius: largest norm, in the units of the weights; must be > 0.
        dtype: that computes the update.
        cache: remembers what depends on the weights alone.
    Raises:
        ValueError: radius is not positive.
    """
    if not radius > 0:  # also true for NaN
        raise ValueError(f"radius must be > 0, got {radius}. To drop an update, do not attach it.")
    weights = (NormCache() if cache is None else cache)(u, v, dtype, norm)
    return c * ball_scale(weights, c, radius, dtype)[..., None]


def ball_scale(
    weights: Grams, c: Float[Tensor, "*chunks R"], radius: float, dtype: torch.dtype
) -> Tensor:
    """The factor (...) of at most 1 that brings each control's update inside the ball of `radius`."""
    info = torch.finfo(dtype)
    bound = norm_bound(weights, c, info.eps / 2)
    # below the smallest normal number rounding is absolute
    lost = info.tiny * info.eps * ((c != 0) * weights.sizes).sum(-1)
    scale = scale_into_ball(bound.detach(), (radius - lost.detach()).clamp(min=0.0))
    if (
        bound.requires_grad
    ):  # the steps of the scale are flat: its gradient is that of radius / bound
        smooth = (radius / bound).clamp(max=1.0)
        scale = scale + (smooth - smooth.detach())
    return scale


def scale_into_ball(bound: Tensor, radius: float | Tensor) -> Tensor:
    """Largest factor of at most 1 that brings norms <= bound inside the ball, rounded down.

    Ten significant bits: multiples of 1/1024 from a half to one, finer below, so that a huge update is
    shrunk and not dropped. Rounding down keeps the norm inside; the billionth that comes off first
    moves round numbers away from the steps, where the last bit of a norm, which depends on the shape
    of the batch, would decide.

    Args:
        bound: float64 (...), not negative.
        radius: >= 0, in the units of the weights.
    """
    scale = (radius * (1 - 1e-9) / bound).clamp(max=1.0)  # bound 0: infinity, so 1
    mantissa, exponent = torch.frexp(scale)  # 0.5 <= mantissa < 1
    return (mantissa * 1024).floor() / 1024 * torch.exp2(exponent.to(scale.dtype))


class Ball:
    """A norm ball around zero for the update U diag(c) V of one site."""

    def __init__(self, radius: float, norm: Norm = "frobenius"):
        """radius: in the units of the weights; must be > 0.

        Raises:
            ValueError: radius is not positive.
        """
        if not radius > 0:  # also true for NaN
            raise ValueError(
                f"radius must be > 0, got {radius}. To drop an update, do not attach it."
            )
        self.radius, self.cache = radius, NormCache()
        self.norm: Norm = norm

    def __call__(self, u: Tensor, v: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
        """See `into_ball`."""
        return into_ball(u, v, c, self.radius, self.norm, dtype, self.cache)


class NormCache:
    """The Gram matrices of a site, computed anew when a weight changed or wants a gradient."""

    def __init__(self) -> None:
        self._watch = Watch()
        self._kept: dict[tuple[torch.dtype, Norm], Grams] = {}

    def __call__(
        self,
        u: Float[Tensor, "out R"],
        v: Float[Tensor, "R in"] | Float[Tensor, "groups ranks part"],
        dtype: torch.dtype,
        norm: Norm,
    ) -> Grams:
        """Of the weights as cast to `dtype`."""
        if torch.is_grad_enabled() and (u.requires_grad or v.requires_grad):
            return grams(u.to(dtype), v.to(dtype), norm)
        if self._watch.changed(u, v) or u.is_inference() or v.is_inference():
            self._kept = {}  # nobody counts the writes to an inference tensor
        if (dtype, norm) not in self._kept:
            with torch.inference_mode(False):  # a later step may want gradients of the control
                self._kept[dtype, norm] = grams(u.detach().to(dtype), v.detach().to(dtype), norm)
        return self._kept[dtype, norm]
