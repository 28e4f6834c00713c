"""BCa bootstrap intervals with the p-value that is their exact dual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf, ldexp, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit

from bem.errors import DataError
from bem.stats.engines import Engine, function_law, law_of, mean_of, resampled_laws
from bem.stats.inputs import ROUNDING, Floats, cluster_codes, over_seeds, sum_by_cluster
from bem.stats.laws import Law
from bem.stats.normal import cdf, quantile
from bem.stats.scale import Scale, ScaledLaw, standardised
from bem.stats.weights import Statistic, ratio

SMALL_SAMPLE = 200
"""Below this many units the interval is widened (Hesterberg 2015)."""


@dataclass(frozen=True)
class Bca:
    """A BCa interval, the p-value that inverts it, and how both came about."""

    lower: float
    upper: float
    observed: float
    bias_correction: float
    """z0, in standard normal units."""
    acceleration: float
    """a, from the jackknife; skewness of the statistic's law over 6."""
    p_value: float
    """Two-sided, H0: statistic = margin. p <= alpha exactly when the interval excludes it."""
    p_greater: float
    """One-sided, against H0: statistic <= margin."""
    p_less: float
    """One-sided, against H0: statistic >= margin."""
    se: float
    """Jackknife standard error."""
    n: int
    """Resampled units: examples, or clusters."""
    alpha: float
    margin: float
    engine: str
    flags: tuple[str, ...] = ()
    """degenerate | acceleration_dropped | few_resamples | small_sample | undefined_resamples"""
    law: Law | None = field(default=None, repr=False, compare=False)

    @property
    def degenerate(self) -> bool:
        return "degenerate" in self.flags

    @property
    def significant(self) -> bool:
        """The interval lies above the margin; never for degenerate data."""
        return not self.degenerate and self.lower > self.margin and self.p_greater <= self.alpha / 2

    def at(self, alpha: float, margin: float | None = None) -> Bca:
        """The same bootstrap read at another level or margin."""
        margin = self.margin if margin is None else margin
        if self.law is None:
            return replace(self, alpha=alpha, margin=margin)
        parts = _Parts(self.observed, self.bias_correction, self.acceleration, self.se, self.n)
        flags = [f for f in self.flags if f == "undefined_resamples"]
        return _read(self.law, parts, alpha, margin, self.engine, flags)


def bca_bootstrap(
    paired_scores: ArrayLike,
    n_bootstrap: int = 10_000,
    alpha: float = 0.05,
    seed: int = 0,
    *,
    statistic: Literal["mean"] | Callable[[Floats], Floats] = "mean",
    clusters: Sequence[Any] | None = None,
    margin: float = 0.0,
    engine: Engine = "auto",
) -> Bca:
    """Bias-corrected and accelerated interval of a paired score difference (Efron 1987).

        interval = quantiles of T* at level(-z) and level(z)
        level(z) = Phi(z0 + (z0 + z) / (1 - a (z0 + z)))
        z0 = Phi^-1(P(T* < T) + P(T* = T) / 2), clamped to [1/2B, 1 - 1/2B]
        a  = sum d^3 / (6 (sum d^2)^1.5), d the jackknife deviations (of clusters if given)
        z  = z_{1-alpha/2}; below 200 units sqrt(n / (n-1)) t_{n-1, 1-alpha/2} (Hesterberg 2015)

    Ties count half: with strict `<` exact-match scores get a z0 that is wrong by the share of ties.
    The p-value solves level(z) for the margin and is significant exactly when the interval excludes
    it.

    Args:
        paired_scores: candidate minus baseline, [examples] or [seeds, examples] (then averaged).
        n_bootstrap: resamples of the Monte-Carlo engines; sets the clamp of z0 in all.
        alpha: miscoverage of the two-sided interval.
        seed: same seed, same answer; the exact and saddlepoint engines use none.
        statistic: the mean, or a function [resamples, n] -> [resamples] (engine gather).
        clusters: label per example; whole clusters are resampled and left out.
        margin: the value that the p-values test.
        engine: auto takes exact for discrete scores, saddlepoint for means, else weights or gather.
    Raises:
        DataError: empty data, NaN or inf (with its index), labels that do not match.
    """
    scores = over_seeds("paired_scores", paired_scores)
    _check_options(n_bootstrap, alpha)
    codes = cluster_codes(clusters, scores.size)
    if callable(statistic):
        if codes is not None:
            raise DataError(
                "clusters need a mean or a Statistic of sums, not a function of samples."
            )
        return _of_function(scores, statistic, n_bootstrap, alpha, seed, margin)
    columns = sum_by_cluster(np.stack([scores, np.ones_like(scores)], axis=1), codes)
    one = Statistic("mean", columns, ratio)
    return joint_bca([one], n_bootstrap, alpha, seed, margins=[margin], engine=engine)[0]


def joint_bca(
    statistics: Sequence[Statistic],
    n_bootstrap: int = 10_000,
    alpha: float = 0.05,
    seed: int = 0,
    *,
    margins: Sequence[float] | None = None,
    engine: Engine = "auto",
) -> list[Bca]:
    """BCa of many statistics of the same units on one shared resample.

    The statistics are metrics x variants x slices (a mask is a column). With `auto`, plain means
    take their exact or saddlepoint law and whatever is left shares one set of multinomial weights.
    With `weights` all share it.
    """
    _check_options(n_bootstrap, alpha)
    margins = margins if margins is not None else [0.0] * len(statistics)
    standard = [standardised(s) for s in statistics]
    parts = [_parts(s) for s, _ in standard]
    laws: dict[int, tuple[Law, str, list[str]]] = {}
    for i, (statistic, _) in enumerate(standard):
        if parts[i].se > 0:
            law, name = law_of(mean_of(statistic), n_bootstrap, seed, engine)
            laws |= {i: (law, name, [])} if law is not None else {}
    waiting = [i for i in range(len(parts)) if parts[i].se > 0 and i not in laws]
    drawn = resampled_laws([standard[i][0] for i in waiting], n_bootstrap, seed) if waiting else []
    laws |= {i: (law, "weights", flags) for i, (law, flags) in zip(waiting, drawn, strict=True)}
    return [
        _in_its_units(parts[i], scale, laws.get(i), n_bootstrap, alpha, margins[i])
        for i, (_, scale) in enumerate(standard)
    ]


def _in_its_units(
    parts: _Parts, scale: Scale, resampled: tuple[Law, str, list[str]] | None,
    n_bootstrap: int, alpha: float, margin: float,
) -> Bca:  # fmt: skip
    """The interval of a standardised statistic, put back."""
    observed, se = scale.back(parts.observed), ldexp(parts.se, scale.exponent)
    if resampled is None:
        return _degenerate(replace(parts, observed=observed), alpha, margin)
    law, engine, flags = resampled
    parts = replace(_clamped(parts, law, n_bootstrap), observed=observed, se=se)
    return _read(ScaledLaw(law, scale), parts, alpha, margin, engine, flags)


@dataclass(frozen=True)
class _Parts:
    """What BCa needs beside the law."""

    observed: float
    z0: float
    acceleration: float
    se: float
    n: int


def _parts(statistic: Statistic) -> _Parts:
    """Observed value and jackknife: leaving a unit out subtracts its row from the sums."""
    columns = statistic.columns[np.any(statistic.columns != 0, axis=1)]
    totals = columns.sum(axis=0)
    observed = float(statistic.of(totals[None])[0])
    if not np.isfinite(observed):
        raise DataError(
            f"{statistic.name} is {observed}: it has no defined value on these examples."
        )
    return _jackknifed(observed, statistic.of(totals - columns))


def _jackknifed(observed: float, left_out: Floats) -> _Parts:
    n = left_out.size
    size = max(abs(observed), float(np.abs(left_out).max(initial=0.0)))
    if n < 2 or not 0 < size < inf:
        return _Parts(observed, 0.0, 0.0, 0.0, n)
    d = (
        left_out / size
    ).mean() - left_out / size  # in these units squares neither vanish nor overflow
    largest = float(np.abs(d).max())
    if largest <= ROUNDING:
        return _Parts(observed, 0.0, 0.0, 0.0, n)
    d /= largest
    squares = float(d @ d)
    acceleration = float(d @ (d * d)) / (6 * squares**1.5)
    se = size * (largest * sqrt((n - 1) / n * squares))
    return _Parts(observed, 0.0, acceleration, se, n)


def _clamped(parts: _Parts, law: Law, n_bootstrap: int) -> _Parts:
    share = law.mid(parts.observed)
    clamp = 0.5 / n_bootstrap
    return replace(parts, z0=quantile(min(max(share, clamp), 1 - clamp)))


def _degenerate(parts: _Parts, alpha: float, margin: float) -> Bca:
    c = parts.observed
    flags = ("degenerate",)
    return Bca(c, c, c, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, parts.n, alpha, margin, "none", flags)


def _read(
    law: Law, parts: _Parts, alpha: float, margin: float, engine: str, flags: list[str]
) -> Bca:
    """Interval and p-values from a law."""
    z0, a = parts.z0, parts.acceleration
    widen = _Widening(parts.n)
    z = widen.quantile(alpha / 2)
    flags = list(flags) + (["small_sample"] if widen.active else [])
    if min(1 - a * (z0 + z), 1 - a * (z0 - z)) <= 0:
        a = 0.0  # one unit dominates: the correction would leave the range of the data
        flags.append("acceleration_dropped")
    low, high = (cdf(z0 + (z0 + s) / (1 - a * (z0 + s))) for s in (z, -z))
    if min(low, 1 - high) < law.floor:
        flags.append("few_resamples")
    w_below = quantile(_clip(law.at_most(margin), law.floor))
    w_above = -quantile(_clip(law.at_least(margin), law.floor))
    p_greater = max(widen.cdf(_inverted(w_below, z0, a)), law.floor)
    p_less = max(widen.cdf(-_inverted(w_above, z0, a)), law.floor)
    lower, upper = (_snap(end, margin, law.eps) for end in (law.lower(low), law.upper(high)))
    return Bca(
        lower, upper, parts.observed, z0, parts.acceleration, min(1.0, 2 * min(p_greater, p_less)),
        p_greater, p_less, parts.se, parts.n, alpha, margin, engine, tuple(flags), law,
    )  # fmt: skip


def _snap(end: float, margin: float, eps: float) -> float:
    """An end point that ties with the margin is the margin: rounding must not decide."""
    return margin if abs(end - margin) <= eps else end


def _inverted(w: float, z0: float, a: float) -> float:
    """The z whose BCa level is Phi(w)."""
    u = w - z0
    if 1 + a * u <= 0:
        return -inf if u < 0 else inf
    return u / (1 + a * u) - z0


class _Widening:
    """Replaces z by sqrt(n / (n-1)) t_{n-1} in small samples (Hesterberg 2015)."""

    def __init__(self, n: int):
        self.active = 2 <= n < SMALL_SAMPLE
        self.df = n - 1
        self.factor = sqrt(n / (n - 1)) if self.active else 1.0

    def quantile(self, p: float) -> float:
        if not self.active:
            return quantile(p)
        return self.factor * float(stdtrit(self.df, p))

    def cdf(self, z: float) -> float:
        if not self.active or np.isinf(z):
            return cdf(z)
        return float(stdtr(self.df, z / self.factor))


def _of_function(
    scores: Floats, statistic: Callable[[Floats], Floats], n_bootstrap: int, alpha: float,
    seed: int, margin: float,
) -> Bca:  # fmt: skip
    observed, left_out, law, flags = function_law(scores, statistic, n_bootstrap, seed)
    parts = _jackknifed(observed, left_out)
    if parts.se == 0.0:
        return _degenerate(parts, alpha, margin)
    return _read(law, _clamped(parts, law, n_bootstrap), alpha, margin, "gather", flags)


def _clip(p: float, floor: float) -> float:
    return min(max(p, floor), 1 - max(floor, 1e-16))


def _check_options(n_bootstrap: int, alpha: float) -> None:
    if n_bootstrap < 1:
        raise ValueError(f"n_bootstrap must be at least 1, got {n_bootstrap}.")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}.")
