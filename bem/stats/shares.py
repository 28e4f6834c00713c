"""Intervals of a share: so many of so many."""

from __future__ import annotations

from math import sqrt

from scipy.special import ndtri


def wilson(successes: float, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927): stays in [0, 1] and has a width at 0 and n too.

    Args:
        n: >= 1.
    """
    z, share = -float(ndtri(alpha / 2)), successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
