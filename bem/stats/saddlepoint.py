"""The bootstrap law of a mean by saddlepoint approximation: no Monte Carlo, O(n), deterministic."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log, sqrt

import numpy as np

from bem.stats.inputs import Floats
from bem.stats.normal import cdf, quantile

NEAR = 0.05
"""|w| below which the tail formula is 0/0 and its limit is taken instead."""


class SaddlepointLaw:
    """P(mean of n draws with replacement <= x), from the cumulants' generating function.

        K(t) = log mean_i exp(t y_i),  K'(t) = x,  w = sign(t) sqrt(2n(tx - K)),  v = t sqrt(n
        K''(t)) P = Phi(r),  r = w + log(v / w) / w           (Barndorff-Nielsen 1986; Davison &
        Hinkley 1988)

    y is centred and scaled to variance 1. Relative error O(n^-3/2) also in the tails; the
    Monte-Carlo noise of 10,000 resamples is larger for n >= 20."""

    floor = 1e-300
    eps = 0.0

    def __init__(self, values: Floats):
        self.n = values.size
        self.mean = float(values.mean())
        centred = values - self.mean
        self.sd = sqrt(float(centred @ centred) / self.n)
        self.y = centred / self.sd
        self.y2 = self.y * self.y
        self.low, self.high = float(self.y.min()), float(self.y.max())
        self.skew = float(self.y2 @ self.y) / (6 * self.n**1.5)
        self._scratch = np.empty(self.n)
        self._last = (0.0, self.skew)

    def mid(self, x: float) -> float:
        return self.at_most(x)

    def at_most(self, x: float) -> float:
        target = (x - self.mean) / self.sd
        if target <= self.low + 1e-12:  # at the smallest score the law has an atom
            return self._all_draws(self.low) if target >= self.low - 1e-12 else 0.0
        return cdf(self._r_at(target)) if target < self.high else 1.0

    def at_least(self, x: float) -> float:
        target = (x - self.mean) / self.sd
        if target >= self.high - 1e-12:
            return self._all_draws(self.high) if target <= self.high + 1e-12 else 0.0
        return cdf(-self._r_at(target)) if target > self.low else 1.0

    def _all_draws(self, end: float) -> float:
        """P(every draw is one of the units at this end of the range)."""
        return (np.count_nonzero(np.abs(self.y - end) < 1e-12) / self.n) ** self.n

    def lower(self, p: float) -> float:
        return self._quantile(p)

    def upper(self, p: float) -> float:
        return self._quantile(p)

    def _cumulants(self, t: float) -> tuple[float, float, float]:
        """K(t), K'(t), K''(t)."""
        tilt = self._scratch
        top = t * (self.high if t > 0 else self.low)
        np.multiply(self.y, t, out=tilt)
        tilt -= top
        np.exp(tilt, out=tilt)
        total = float(tilt.sum())
        slope = float(tilt @ self.y) / total
        return top + log(total / self.n), slope, float(tilt @ self.y2) / total - slope * slope

    def _r(self, t: float, cumulants: tuple[float, float, float]) -> float:
        k, slope, curve = cumulants
        w = sqrt(max(2 * self.n * (t * slope - k), 0.0)) * (1.0 if t > 0 else -1.0)
        if abs(w) < NEAR:
            return w + self.skew
        return w + log(t * sqrt(self.n * max(curve, 1e-300)) / w) / w

    def _r_at(self, target: float) -> float:
        if target == 0.0:
            return self.skew  # t = 0: the mean itself
        if target == self._last[0]:
            return self._last[1]
        t, cumulants = self._solve(lambda _, c: c[1] - target, lambda c: c[2], target)
        self._last = (target, self._r(t, cumulants))
        return self._last[1]

    def _quantile(self, p: float) -> float:
        if not 0 < p < 1:
            return self.mean + self.sd * (self.low if p <= 0 else self.high)
        goal = quantile(p)
        # dr/dt is close to sqrt(n K''): the step is Newton's up to O(n^-1/2)
        _, cumulants = self._solve(
            lambda t, c: self._r(t, c) - goal,
            lambda c: sqrt(self.n * max(c[2], 1e-300)),
            (goal - self.skew) / sqrt(self.n),
        )
        return self.mean + self.sd * cumulants[1]

    def _solve(
        self,
        excess: Callable[[float, tuple[float, float, float]], float],
        slope: Callable[[tuple[float, float, float]], float],
        start: float,
    ) -> tuple[float, tuple[float, float, float]]:
        """Root in t of an increasing function: a Newton step, then secants that never leave the
        bracket."""
        below, above, t = -inf, inf, start
        last_t, last_gap = t, inf
        for _ in range(100):
            cumulants = self._cumulants(t)
            gap = excess(t, cumulants)
            if abs(gap) < 1e-10:
                break
            below, above = (t, above) if gap < 0 else (below, t)
            rise = slope(cumulants) if last_gap == inf else (gap - last_gap) / (t - last_t)
            last_t, last_gap = t, gap
            t = t - gap / rise if rise > 0 else inf
            if not below < t < above:
                t = _inside(below, above)
            if t == last_t:
                break
        return t, cumulants


def _inside(below: float, above: float) -> float:
    """A point between the ends of a bracket; doubling outwards while one end is open."""
    if below == -inf:
        return above - 1 - abs(above)
    return below + 1 + abs(below) if above == inf else 0.5 * (below + above)
