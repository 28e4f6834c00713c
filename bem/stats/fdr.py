"""False discovery rate over a declared family of hypotheses, and the intervals that go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bem.errors import DataError
from bem.stats.inputs import Floats, finite


@dataclass(frozen=True)
class Discoveries:
    """What a step-up procedure decided, in the order of the p-values it was given."""

    rejected: NDArray[np.bool_]
    adjusted_p_values: Floats
    fcr_level: float
    """Miscoverage level of the intervals of what was selected; alpha itself if nothing was."""

    @property
    def n_rejected(self) -> int:
        return int(self.rejected.sum())


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
    m = p.size
    penalty = 1.0 if method == "bh" else float((1.0 / np.arange(1, m + 1)).sum())
    order = np.argsort(p, kind="stable")
    scaled = penalty * m * p[order] / np.arange(1, m + 1)
    adjusted = np.empty(m)
    adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1.0)
    rejected = adjusted <= alpha
    selected = int(rejected.sum())
    level = alpha * selected / (penalty * m) if selected else alpha
    return Discoveries(rejected, adjusted, level)


def _in_unit_interval(p: Floats, alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}.")
    outside = np.flatnonzero((p < 0) | (p > 1))
    if outside.size:
        raise DataError(f"p_values[{outside[0]}] is {p[outside[0]]}, outside [0, 1].")
