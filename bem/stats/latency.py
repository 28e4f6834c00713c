"""How much slower: Hodges-Lehmann ratio of paired timings with limits by Wilcoxon inversion."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, sqrt

import numpy as np
from numpy.typing import ArrayLike

from bem.errors import DataError
from bem.stats import normal
from bem.stats.inputs import finite

EXACT_ROUNDS = 60
"""Up to this many rounds the null law of the signed-rank sum is computed, above it is normal."""
MAX_ROUNDS = 2000


@dataclass(frozen=True)
class RatioLimits:
    """Typical ratio candidate / baseline with one-sided limits."""

    ratio: float
    lower: float
    """The true ratio lies below it with probability at most alpha. 0 if too few rounds."""
    upper: float
    """The true ratio lies above it with probability at most alpha. inf if too few rounds."""
    rounds: int
    alpha: float


def paired_ratio(candidate: ArrayLike, baseline: ArrayLike, alpha: float = 0.05) -> RatioLimits:
    """Ratio of paired positive measurements, robust to outliers (Hodges & Lehmann 1963).

        ratio = exp(median over i <= j of (d_i + d_j) / 2),  d = log candidate - log baseline

    The limits are the Walsh averages at which the one-sided signed-rank test would just reject.
    Rounds are pairs: interleave them (A B A B), so that drift of the machine cancels. Below 5
    rounds no limit exists at alpha = 0.05.

    Args:
        candidate, baseline: [rounds], same unit, > 0; rounds i of both were run side by side.
    Raises:
        DataError: different lengths, NaN, or a time that is not positive.
    """
    a, b = finite("candidate", candidate), finite("baseline", baseline)
    if a.size != b.size:
        raise DataError(
            f"{a.size} candidate rounds cannot be paired with {b.size} baseline rounds."
        )
    if a.size > MAX_ROUNDS:
        raise DataError(f"{a.size} rounds: at most {MAX_ROUNDS}; take the median of blocks first.")
    if min(a.min(), b.min()) <= 0:
        raise DataError(f"Timings must be positive, got {min(a.min(), b.min())}.")
    d = np.log(a) - np.log(b)
    i, j = np.triu_indices(d.size)
    walsh = np.sort((d[i] + d[j]) / 2)
    cut = _signed_rank_cut(d.size, alpha)
    lower = exp(walsh[cut]) if cut is not None else 0.0
    upper = exp(walsh[-1 - cut]) if cut is not None else inf
    return RatioLimits(exp(float(np.median(walsh))), lower, upper, d.size, alpha)


def _signed_rank_cut(n: int, alpha: float) -> int | None:
    """Largest c with P(W <= c) <= alpha for the signed-rank sum of n; None if there is none."""
    if n > EXACT_ROUNDS:
        mean, sd = n * (n + 1) / 4, sqrt(n * (n + 1) * (2 * n + 1) / 24)
        return int(mean + sd * normal.quantile(alpha) - 0.5)
    ways = np.zeros(n * (n + 1) // 2 + 1)
    ways[0] = 1.0
    for rank in range(1, n + 1):  # each rank joins the sum or not, with probability 1/2
        ways[rank:] += ways[:-rank].copy()
        ways *= 0.5
    cut = int(np.searchsorted(np.cumsum(ways), alpha * (1 + 1e-12), "right")) - 1
    return cut if cut >= 0 else None
