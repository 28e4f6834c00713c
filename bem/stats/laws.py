"""The law of a resampled statistic, as BCa needs it: tail probabilities and quantiles.

Every engine ends in one of these. Quantiles and tails agree exactly: `lower(p) > x` if and only if
`at_most(x) <= p`, and `upper(p) < x` if and only if `at_least(x) <= 1 - p`. From this follows that
a BCa p-value and a BCa interval can never contradict each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bem.stats.inputs import Floats

TIE = 1e-5
"""Values closer than this many standard deviations are ties: float32 sums err by about 1e-6."""
ON_GRID = 1e-7
"""Values no further from a grid than this many of its steps lie on it."""
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
        self.eps = TIE * _spread(values)
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


def _spread(values: Floats) -> float:
    """Standard deviation; squares neither overflow nor vanish, whatever the unit."""
    largest = float(np.abs(values).max())
    return largest * float((values / largest).std()) if largest > 0 else 0.0


@dataclass(frozen=True)
class Lattice:
    """Values on a grid: value = offset + code * step."""

    codes: NDArray[np.int64]
    """[n] integers from 0."""
    offset: float
    step: float

    @property
    def start(self) -> int:
        """The smallest value in whole steps from 0; of values of which one is 0."""
        return round(self.offset / self.step)


def as_lattice(values: Floats) -> Lattice | None:
    """`values` on the coarsest grid that holds them all, or None if it had too many points.

    The step is the greatest common divisor of their gaps, so that neither a shift nor a change of
    unit makes scores continuous that were discrete.
    """
    longest = MAX_LATTICE / (20 * sqrt(values.size) + 32)
    if _common_step(np.unique(values[:16]), longest) is None:  # continuous data leave here
        return None
    support = np.unique(values)
    step = _common_step(support, longest) if support.size <= 4096 else None
    if step is None:
        return None
    offset = float(support[0])
    return Lattice(np.rint((values - offset) / step).astype(np.int64), offset, step)


def _common_step(support: Floats, longest: float) -> float | None:
    """Greatest common divisor of the gaps between sorted values, by Euclid's algorithm on floats.

    None if the range would hold more than `longest` steps. Equal values: any step is one, say 1.
    """
    gaps = support[1:] - support[0]
    if not gaps.size:
        return 1.0
    step, rest = float(gaps[-1]), gaps
    while (rest := rest[rest > step / (8 * longest)]).size:  # less is rounding: no step is so small
        step = float(rest.min())
        if gaps[-1] > longest * step:
            return None
        rest = np.abs(gaps - np.rint(gaps / step) * step)
    step = float(gaps[-1] / np.rint(gaps[-1] / step))  # the longest gap knows it best
    off = np.abs(gaps / step - np.rint(gaps / step)).max()
    return step if off < ON_GRID else None


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
        self.values = lattice.offset + (first + np.arange(periods)) * (lattice.step / n)
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
