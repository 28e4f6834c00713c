"""Means in units of their own, so that neither a shift nor a change of unit moves an interval.

Scores of 1e-9 are not all "equal to 0", scores of 1e-300 have squares, and a loss around 1e6 keeps its
digits: what is resampled lies around 0 and below 1, and the result is put back.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp, ldexp

import numpy as np

from bem.stats.inputs import ROUNDING
from bem.stats.laws import Law
from bem.stats.weights import Statistic, ratio


@dataclass(frozen=True)
class Scale:
    """value = shift + 2^exponent * standardised value; a power of two costs no digit."""

    shift: float = 0.0
    exponent: int = 0

    def back(self, standardised: float) -> float:
        """A standardised value as it was."""
        return self.shift + ldexp(standardised, self.exponent)

    def there(self, value: float) -> float:
        """A value, standardised."""
        with np.errstate(over="ignore"):  # a margin may be infinitely many tiny scores away
            return float(np.ldexp(value - self.shift, -self.exponent))


def standardised(statistic: Statistic) -> tuple[Statistic, Scale]:
    """A ratio of sums (a mean) about one of its values, their median, and at most 1 in size.

    Values that differ by rounding alone become equal. Other statistics are returned as they are.
    """
    sums, sizes = statistic.columns[:, 0], statistic.columns[:, -1]
    inside = sizes != 0
    if statistic.of is not ratio or not inside.any():
        return statistic, Scale()
    values = sums[inside] / sizes[inside]
    shift = float(np.partition(values, values.size // 2)[values.size // 2])
    centred = sums - shift * sizes
    largest = float(np.abs(centred).max())
    if largest <= ROUNDING * float(np.abs(sums).max()):
        centred, largest = np.zeros_like(centred), 1.0
    exponent = frexp(largest)[1]
    columns = np.stack([np.ldexp(centred, -exponent), sizes], axis=1)
    return Statistic(statistic.name, columns, ratio), Scale(shift, exponent)


class ScaledLaw:
    """The law of a statistic, from that of the standardised one."""

    def __init__(self, law: Law, scale: Scale):
        self.law, self.scale = law, scale
        self.floor = law.floor
        self.eps = ldexp(law.eps, scale.exponent)

    def mid(self, x: float) -> float:
        return self.law.mid(self.scale.there(x))

    def at_most(self, x: float) -> float:
        return self.law.at_most(self.scale.there(x))

    def at_least(self, x: float) -> float:
        return self.law.at_least(self.scale.there(x))

    def lower(self, p: float) -> float:
        return self.scale.back(self.law.lower(p))

    def upper(self, p: float) -> float:
        return self.scale.back(self.law.upper(p))
