"""The law of a resampled statistic, as BCa needs it: tail probabilities and quantiles.

Every engine ends in one of these. Quantiles and tails agree exactly: `lower(p) > x` if and only if
`at_most(x) <= p`, and `upper(p) < x` if and only if `at_least(x) <= 1 - p`. From this follows that
a BCa p-value and a BCa interval can never contradict each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, sqrt
from typing import Protocol

import numpy as np

from bem.stats.inputs import Floats

TIE = 1e-5
"""Values closer than this many standard deviations are ties: float32 sums err by about 1e-6."""
MAX_DENOMINATOR = 60
"""Multiples of 1/k for some k up to this are discrete scores (EM averaged over k seeds)."""
MAX_LATTICE = 1 << 20
"""Longest lattice (40 standard deviations of the sum, in steps) that the exact engine convolves."""


class Law(Protocol):
    """Distribution of a resampled statistic."""

    floor: float
    """Smallest tail probability that the law can vouch for."""
    eps: float
    """Values no further apart than this are ties."""

    def mid(self, x: float) -> float:
        """P(T < x) + P(T = x) / 2."""
        ...

    def at_most(self, x: float) -> float:
        """P(T <= x); Monte-Carlo laws count the observed sample itself (+1)."""
        ...

    def at_least(self, x: float) -> float:
        """P(T >= x); likewise."""
        ...

    def lower(self, p: float) -> float:
        """Lower end point whose tail is p."""
        ...

    def upper(self, p: float) -> float:
        """Upper end point whose tail is 1 - p."""
        ...


class EmpiricalLaw:
    """B Monte-Carlo values of the statistic.

    End points are order statistics of B + 1 (Davison & Hinkley 1997, eq. 5.6), so that tails of the
    form (count + 1) / (B + 1) are their exact inverse.
    """

    def __init__(self, values: Floats):
        self.sorted = np.sort(values)
        self.eps = TIE * float(values.std())
        self.floor = 1.0 / (values.size + 1)

    def mid(self, x: float) -> float:
        below, through = self._below(x), self._through(x)
        return (below + through) / (2 * self.sorted.size)

    def at_most(self, x: float) -> float:
        return (self._through(x) + 1) * self.floor

    def at_least(self, x: float) -> float:
        return (self.sorted.size - self._below(x) + 1) * self.floor

    def lower(self, p: float) -> float:
        rank = int(p / self.floor + 1e-9)
        return float(self.sorted[max(rank, 1) - 1])

    def upper(self, p: float) -> float:
        rank = int((1 - p) / self.floor + 1e-9)
        return float(self.sorted[-max(rank, 1)])

    def _below(self, x: float) -> int:
        return int(np.searchsorted(self.sorted, x - self.eps, "left"))

    def _through(self, x: float) -> int:
        return int(np.searchsorted(self.sorted, x + self.eps, "right"))


@dataclass(frozen=True)
class Lattice:
    """Values as integers: value = (start + code) * step."""

    codes: np.ndarray
    """[n] integers from 0."""
    start: int
    step: float


def as_lattice(values: Floats) -> Lattice | None:
    """`values` on the coarsest grid through 0 of step m/k, k <= MAX_DENOMINATOR; else None."""
    if _denominator(values[:16]) is None:  # continuous data leave here
        return None
    support = np.unique(values)
    k = _denominator(support) if support.size <= 4096 else None
    if k is None or (support[-1] - support[0]) * k * (20 * sqrt(values.size) + 32) > MAX_LATTICE:
        return None
    whole = np.rint(values * k).astype(np.int64)
    common = gcd(*np.unique(whole - whole.min()).tolist()) or 1
    if whole.min() % common:  # the grid does not go through 0: keep the finer one
        common = gcd(common, int(whole.min()))
    start = int(whole.min()) // common
    return Lattice(whole // common - start, start, common / k)


def _denominator(values: Floats) -> int | None:
    """Smallest k <= MAX_DENOMINATOR for which every value is a multiple of 1/k."""
    if np.abs(values).max() > 1e6:
        return None
    scaled = values * np.arange(1, MAX_DENOMINATOR + 1)[:, None]
    fits = (np.abs(scaled - np.rint(scaled)) < 1e-7).all(axis=1)
    return int(np.argmax(fits)) + 1 if fits.any() else None


def power_of_pmf(pmf: Floats, n: int, periods: int) -> Floats:
    """[periods] law of the sum of n draws from `pmf` on 0, 1, ..., modulo `periods` (FFT)."""
    return np.fft.irfft(np.fft.rfft(pmf, periods) ** n, periods).clip(min=0.0)


class LatticeLaw:
    """The ideal bootstrap law of a mean of discrete scores: no Monte Carlo, the same at every seed.

    The resampled sum is n draws from the observed frequencies: its law is their n-fold convolution.
    The Fourier transform wraps at 40 standard deviations, beyond which nothing is left to round
    off.
    """

    floor = 1e-12  # what is left of double precision after the transform

    def __init__(self, lattice: Lattice):
        n = lattice.codes.size
        pmf = np.bincount(lattice.codes) / n
        mean, sd = float(lattice.codes.sum()), float(lattice.codes.std() * np.sqrt(n))
        half = int(20 * sd + 16 * pmf.size) + 1
        periods = min(n * (pmf.size - 1) + 1, 2 * half)
        first = max(0, int(mean) - half) if periods == 2 * half else 0
        wrapped = power_of_pmf(pmf, n, periods)
        law = np.roll(wrapped, -(first % periods))
        self.cdf = np.cumsum(law)
        self.sf = np.cumsum(law[::-1])[::-1]
        self.values = (lattice.start * n + first + np.arange(periods)) * (lattice.step / n)
        self.eps = 1e-6 * lattice.step / n

    def mid(self, x: float) -> float:
        return 0.5 * (self.at_most(x) + 1.0 - self.at_least(x))

    def at_most(self, x: float) -> float:
        index = int(np.searchsorted(self.values, x + self.eps, "right")) - 1
        return float(np.clip(self.cdf[index], 0, 1)) if index >= 0 else 0.0

    def at_least(self, x: float) -> float:
        index = int(np.searchsorted(self.values, x - self.eps, "left"))
        return float(np.clip(self.sf[index], 0, 1)) if index < self.sf.size else 0.0

    def lower(self, p: float) -> float:
        index = int(np.searchsorted(self.cdf, p, "right"))  # first value with P(T <= value) > p
        return float(self.values[min(index, self.values.size - 1)])

    def upper(self, p: float) -> float:
        above = int(np.searchsorted(self.sf[::-1], 1 - p, "right"))
        return float(self.values[max(self.values.size - 1 - above, 0)])
