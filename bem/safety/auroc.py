"""The area under the ROC curve with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, rankdata

from bem.errors import MeasurementError


@dataclass(frozen=True)
class Auroc:
    """P(a positive scores above a negative), ties counted half."""

    value: float
    ci_low: float
    ci_high: float
    positives: int
    negatives: int


def auroc(positives: Sequence[float], negatives: Sequence[float], level: float = 0.95) -> Auroc:
    """AUROC with DeLong's interval (DeLong et al. 1988; placements by ranks: Sun & Xu 2014).

    Raises:
        MeasurementError: fewer than two of either, or scores that are not finite.
    """
    x, y = np.asarray(positives, dtype=np.float64), np.asarray(negatives, dtype=np.float64)
    m, n = len(x), len(y)
    if min(m, n) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise MeasurementError(
            f"an AUROC needs two finite scores of each kind, got {m} positives and {n} negatives."
        )
    together = rankdata(np.concatenate([x, y]))
    above = (together[:m] - rankdata(x)) / n  # share of the negatives below each positive
    below = 1 - (together[m:] - rankdata(y)) / m
    value = float(above.mean())
    error = float(np.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n))
    reach = float(norm.ppf(0.5 + level / 2)) * error
    return Auroc(value, max(0.0, value - reach), min(1.0, value + reach), m, n)
