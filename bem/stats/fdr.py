"""Several tests at once: false discovery rate over a declared family, and Holm's familywise test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control

from bem.errors import DataError
from bem.stats.inputs import Floats, finite

ROUNDING = 1e-12
"""Relative: an adjusted p this close to alpha stands on the boundary, and the boundary rejects."""


@dataclass(frozen=True)
class Discoveries:
    """What a step-up procedure decided, in the order of the p-values it was given."""

    rejected: NDArray[np.bool_]
    adjusted_p_values: Floats
    fcr_level: float
    """Miscoverage level of the intervals of what was selected; alpha itself if nothing was."""


def benjamini_hochberg_correction(
    p_values: ArrayLike, alpha: float = 0.05, method: Literal["bh", "by"] = "bh"
) -> Discoveries:
    """Step-up control of the false discovery rate.

        adjusted p_(i) = min_{j >= i} min(1, c m p_(j) / j),  rejected where adjusted p <= alpha

    c = 1: Benjamini & Hochberg 1995 (independent or positively dependent tests).
    c = sum_{k=1}^m 1/k: Benjamini & Yekutieli 2001 (any dependence).
    The intervals of the R selected keep their false coverage rate at level 1 - R alpha / (c m)
    (Benjamini & Yekutieli 2005).

    Args:
        p_values: [m], each in [0, 1].
    Raises:
        DataError: NaN, or a value outside [0, 1].
    """
    p = finite("p_values", p_values)
    _in_unit_interval(p, alpha)
    adjusted = np.asarray(false_discovery_control(p, method=method), dtype=np.float64)
    adjusted[np.abs(adjusted - alpha) <= ROUNDING * alpha] = alpha  # 6 * .05 / 6 is not .05
    rejected = adjusted <= alpha
    selected = int(rejected.sum())
    penalty = 1.0 if method == "bh" else float((1.0 / np.arange(1, p.size + 1)).sum())
    level = alpha * selected / (penalty * p.size) if selected else alpha
    return Discoveries(rejected, adjusted, level)


def holm(p_values: ArrayLike) -> Floats:
    """Adjusted p-values that keep the chance of any false rejection below their level (Holm 1979).

        adjusted p_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)),  under any dependence

    Args:
        p_values: [m], each in [0, 1]; may be empty.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1.0, np.arange(p.size, 0, -1) * p[order])
    adjusted = np.empty(p.size)
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted


def _in_unit_interval(p: Floats, alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}.")
    outside = np.flatnonzero((p < 0) | (p > 1))
    if outside.size:
        raise DataError(f"p_values[{outside[0]}] is {p[outside[0]]}, outside [0, 1].")
