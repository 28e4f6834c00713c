"""The directions of a residual stream along which harmful and harmless prompts differ.

    diff of means   mean of harmful minus mean of harmless states (arXiv:2406.11717)
    the rest        principal directions of per-category differences, whitened by the harmless covariance: a
                    refusal is a cone, not a line (arXiv:2502.17420)

States are those of a prompt's last token, divided by their root mean square, each coordinate clipped to the
middle 99 % (massive activations would be all that is left). Float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bem.errors import SafetyError

CLIPPED = 0.005
"""Share at either end."""


def unit_rms(h: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
    """States with a root mean square of one, float64."""
    h = h.double()
    return h / h.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)


def coordinates(
    h: Float[Tensor, "*tokens d"], directions: Float[Tensor, "d s"]
) -> tuple[Float[Tensor, "*tokens s"], Float[Tensor, "*tokens 1"]]:
    """(z / r, r): z = U^T h in units of r, the root mean square of what of h lies outside U.

    So what is written outside of U, however large, moves a coordinate towards zero and no further than
    its own growth; and lifting z leaves r as it is.
    """
    z = h @ directions
    outside = (h.square().sum(-1, keepdim=True) - z.square().sum(-1, keepdim=True)).clamp(min=1e-12)
    r = (outside / h.shape[-1]).sqrt()
    return z / r, r


def contrast_directions(
    harmful: Float[Tensor, "n d"],
    harmless: Float[Tensor, "m d"],
    categories: Sequence[int],
    most: int = 8,
) -> Float[Tensor, "d s"]:
    """An orthonormal basis U, s <= most; along each of its directions harmful states lie higher on average.

    Args:
        harmful, harmless: states of last tokens.
        categories: number of each harmful prompt's category.
    Raises:
        SafetyError: fewer than eight prompts of either kind, or states that are not finite.
    """
    if min(len(harmful), len(harmless)) < 8 or not 1 <= most <= 8:
        raise SafetyError(
            f"directions need eight prompts of each kind and 1 to 8 directions, got {len(harmful)} harmful, "
            f"{len(harmless)} harmless, {most} directions."
        )
    bad, good = _clipped(unit_rms(harmful)), _clipped(unit_rms(harmless))
    if not (torch.isfinite(bad).all() and torch.isfinite(good).all()):
        raise SafetyError("some states are not finite: the base diverges on these prompts.")
    centre = good.mean(0)
    found = [(bad.mean(0) - centre)[:, None]]
    of = torch.as_tensor(categories)
    groups = [bad[of == c].mean(0) - centre for c in of.unique() if int((of == c).sum()) > 1]
    if len(groups) > 1:
        root = _inverse_root(shrunk_covariance(good))
        _, values, right = torch.linalg.svd(torch.stack(groups) @ root, full_matrices=False)
        kept = right[values > 1e-9 * values[0]]
        found.append(root @ kept.mT)
    basis = torch.linalg.qr(torch.cat(found, 1)[:, :most]).Q
    sign = torch.sign((bad.mean(0) - centre) @ basis)
    return basis * torch.where(sign == 0, 1.0, sign)


def shrunk_covariance(x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Oracle-approximating shrinkage (Chen et al., 2010): of fewer rows than columns it has full rank."""
    n, d = x.shape
    centred = x - x.mean(0)
    s = centred.mT @ centred / n
    alpha, mu = float(s.square().mean()), float(s.trace()) / d
    top, below = alpha + mu**2, (n + 1) * (alpha - mu**2 / d)
    rho = 1.0 if below == 0 else min(1.0, top / below)
    return (1 - rho) * s + rho * mu * torch.eye(d, dtype=x.dtype)


def discriminant(bad: Float[Tensor, "n s"], good: Float[Tensor, "m s"]) -> Float[Tensor, " s"]:
    """Weights of Fisher's linear discriminant between few coordinates."""
    spread = torch.cat([bad - bad.mean(0), good - good.mean(0)])
    s = spread.mT @ spread / len(spread)
    return torch.linalg.solve(s + 1e-6 * s.trace() * torch.eye(len(s), dtype=s.dtype), bad.mean(0) - good.mean(0))  # fmt: skip


def clusters(x: Float[Tensor, "n d"], count: int, seed: int = 0, rounds: int = 25) -> list[int]:
    """k-means on directions, for prompts that name no category: the number of each one's cluster."""
    unit = torch.nn.functional.normalize(unit_rms(x) - unit_rms(x).mean(0), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    centres = unit[torch.randperm(len(unit), generator=generator)[:count]]
    of = torch.zeros(len(unit), dtype=torch.long)
    for _ in range(rounds):
        of = (unit @ centres.mT).argmax(1)
        means = [unit[of == c].mean(0) if bool((of == c).any()) else centres[c] for c in range(len(centres))]  # fmt: skip
        centres = torch.nn.functional.normalize(torch.stack(means), dim=-1)
    return of.tolist()


def _clipped(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return x.clamp(torch.quantile(x, CLIPPED, 0), torch.quantile(x, 1 - CLIPPED, 0))


def _inverse_root(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=1e-12 * float(values[-1])).rsqrt() @ vectors.mT
