"""Standard normal probabilities and quantiles of scalars, right far into the tails, without
scipy."""

from __future__ import annotations

from math import erfc, inf, sqrt
from statistics import NormalDist

_STANDARD = NormalDist()


def cdf(x: float) -> float:
    """P(Z <= x); the standard library's own loses the left tail to cancellation below -6."""
    return 0.5 * erfc(-x / sqrt(2))


def quantile(p: float) -> float:
    """z with P(Z <= z) = p; -inf and inf at 0 and 1."""
    if p <= 0 or p >= 1:
        return -inf if p <= 0 else inf
    return _STANDARD.inv_cdf(p)
