"""Bets against a null hypothesis on a bounded mean; what they win is evidence, at any time.

    wealth <- wealth * (1 + l t (z - m)),     t = 1: the null is mean z <= m;  t = -1: mean z >= m

with l fixed before z is seen and so small that no factor is negative: under the null the wealth is a
non-negative supermartingale that starts at 1, so P(it ever reaches 1/a) <= a (Ville). Which l is
best depends on the truth, so the wealth is split between eight (Waudby-Smith & Ramdas 2024, section
4): the mean of martingales is one. z is

    a paired difference, in [-w, w];
    of a share of traffic, +(y - c)/p for the candidate, -(y - c)/(1 - p) for the baseline, where p is
    the chance of being given to the candidate and c any number known before: the coin makes its
    expectation the difference of the means, whatever the traffic does meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

FRACTIONS = 0.9 * 2.0 ** -np.arange(8)
"""Of the largest bet that cannot lose more than everything."""
PRIOR = 20
"""Weight, in scores, of the middle of the range in the running mean c."""


class Bet:
    """One null hypothesis on the mean of candidate less baseline."""

    def __init__(self, null: float, width: float, share: float | None, fallen: bool):
        """
        Args:
            null: m, in the scores' units.
            width: highest less lowest possible score.
            share: chance of being given to the candidate; None: paired.
            fallen: bet that the mean is below m; else that it is above.
        """
        self.null, self.width, self.share = null, width, share
        self.sign = -1.0 if fallen else 1.0
        self.log_wealth = np.zeros(len(FRACTIONS))
        self.best = 1.0
        """The largest wealth so far; no evidence is 1."""
        self.n, self.total = 0, 0.0
        self._seen, self._sum = PRIOR, PRIOR * width / 2

    @property
    def mean(self) -> float:
        """Estimate of candidate less baseline; 0 without data."""
        return self.total / self.n if self.n else 0.0

    def paired(self, difference: float) -> None:
        """Candidate less baseline on one example, in [-width, width]."""
        self._bet(difference, self.width)

    def answered(self, candidate: bool, score: float) -> None:
        """One answered request; the score less the lowest possible one, in [0, width]."""
        assert self.share is not None
        centre, p = self._sum / self._seen, self.share
        z = (score - centre) / p if candidate else (centre - score) / (1 - p)
        self._bet(z, float(_farthest(centre, self.width, p, self.sign)))
        self._seen += 1
        self._sum += score

    def _bet(self, z: float, farthest: float) -> None:
        self.log_wealth += _log_factors(z, farthest, self.null, self.sign)
        self.n += 1
        self.total += z
        self.best = max(self.best, float(_mean_wealth(self.log_wealth)))

    def state(self) -> dict[str, Any]:
        """JSON values; `restore` is the inverse."""
        return {
            "log_wealth": self.log_wealth.tolist(),
            "best": self.best,
            "n": self.n,
            "total": self.total,
            "seen": self._seen,
            "sum": self._sum,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another bet of the same kind was."""
        self.log_wealth = np.array(state["log_wealth"], dtype=np.float64)
        self.best, self.n, self.total = state["best"], state["n"], state["total"]
        self._seen, self._sum = state["seen"], state["sum"]


def paired_wealth(
    differences: np.ndarray, null: float, width: float, fallen: bool
) -> Float[np.ndarray, "*runs n"]:
    """`Bet.paired` for many runs at once: the wealth after each of (..., n) differences."""
    sign = -1.0 if fallen else 1.0
    factors = _log_factors(differences[..., None], width, null, sign)
    return _mean_wealth(factors.cumsum(axis=-2))


def answered_wealth(
    candidate: np.ndarray, scores: np.ndarray, null: float, width: float, share: float, fallen: bool
) -> Float[np.ndarray, "*runs n"]:
    """`Bet.answered` for many runs at once: candidate bool (..., n), scores in [0, width] (..., n)."""
    sign = -1.0 if fallen else 1.0
    seen = PRIOR + np.arange(scores.shape[-1])
    centre = (PRIOR * width / 2 + scores.cumsum(axis=-1) - scores) / seen
    z = np.where(candidate, (scores - centre) / share, (centre - scores) / (1 - share))
    farthest = _farthest(centre, width, share, sign)[..., None]
    return _mean_wealth(_log_factors(z[..., None], farthest, null, sign).cumsum(axis=-2))


def _farthest(centre: Any, width: float, p: float, sign: float) -> np.ndarray:
    """The most by which z can lie on the losing side of 0, known before it is seen."""
    above, below = width - centre, centre
    if sign < 0:
        return np.maximum(above / p, below / (1 - p))
    return np.maximum(below / p, above / (1 - p))


def _log_factors(z: Any, farthest: Any, null: float, sign: float) -> np.ndarray:
    """(..., bets) of z (..., 1)."""
    largest = 1 / (farthest + sign * null)
    return np.log1p(FRACTIONS * (largest * sign * (z - null)))


def _mean_wealth(log_wealth: np.ndarray) -> np.ndarray:
    """Mean over the last axis; at most e^700, so that it stays a number."""
    top = log_wealth.max(axis=-1)
    return np.exp(np.minimum(top, 700.0)) * np.exp(log_wealth - top[..., None]).mean(axis=-1)
