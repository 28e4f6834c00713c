"""Which law a statistic gets: exact, saddlepoint, multinomial weights, or index draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from bem.errors import DataError
from bem.stats.inputs import Floats
from bem.stats.laws import EmpiricalLaw, LatticeLaw, Law, as_lattice
from bem.stats.saddlepoint import SaddlepointLaw
from bem.stats.weights import CELLS, Statistic, ratio, resample

Engine = Literal["auto", "exact", "saddlepoint", "weights"]

MIN_SADDLEPOINT = 20
"""Fewer units than this: Monte Carlo is cheap and the approximation is not proven good."""
MAX_SHARE = 0.2
"""A unit with more of the variance than this makes the mean lumpy: Monte Carlo again."""
MIN_NONZERO = 20
"""So do data that are nearly all equal."""


def mean_of(statistic: Statistic) -> Floats | None:
    """The values whose plain mean the statistic is, or None if it is no plain mean.

    A slice of unclustered examples is a plain mean over its members: its size is given, not random.
    """
    if statistic.of is not ratio:
        return None
    sums, sizes = statistic.columns[:, 0], statistic.columns[:, 1]
    inside = sizes != 0
    if np.ptp(sizes[inside]) != 0:
        return None
    return sums[inside] / sizes[inside]


def law_of(
    values: Floats | None, n_bootstrap: int, seed: int, engine: Engine
) -> tuple[Law | None, str]:
    """The analytic law of a mean, or None if the statistic has to be resampled."""
    if engine not in ("auto", "exact", "saddlepoint", "weights"):
        raise ValueError(f"engine must be auto, exact, saddlepoint or weights, got {engine!r}.")
    if engine == "weights" or (values is None and engine == "auto"):
        return None, "weights"
    if values is None:
        raise DataError(f"engine {engine!r} needs a plain mean; use 'auto' or 'weights'.")
    lattice = as_lattice(values) if engine != "saddlepoint" else None
    if lattice is not None:
        return LatticeLaw(lattice), "exact"
    if engine == "exact":
        raise DataError("engine 'exact' needs discrete scores: equal steps, and not too many.")
    if engine == "saddlepoint" or _smooth(values):
        return SaddlepointLaw(values), "saddlepoint"
    return None, "weights"


def _smooth(values: Floats) -> bool:
    """Whether the law of the mean is close enough to continuous for the saddlepoint."""
    if values.size < MIN_SADDLEPOINT:
        return False
    squares = (values - values.mean()) ** 2
    middle = np.partition(values, values.size // 2)[values.size // 2]
    apart = np.count_nonzero(values != middle)
    return bool(squares.max() <= MAX_SHARE * squares.sum() and apart >= MIN_NONZERO)


def resampled_laws(
    statistics: Sequence[Statistic], n_bootstrap: int, seed: int
) -> list[tuple[Law, list[str]]]:
    """Monte-Carlo laws of all statistics on one shared resample."""
    values = resample(statistics, n_bootstrap, seed)
    return [_empirical(column, s.name) for s, column in zip(statistics, values.T, strict=True)]


def function_law(
    scores: Floats, statistic: Callable[[Floats], Floats], n_bootstrap: int, seed: int
) -> tuple[float, Floats, Law, list[str]]:
    """Observed value, leave-one-out values and resampled law of any function of a sample.

    The function maps [rows, n] to [rows]. Index draws in blocks of bounded memory; O(n^2)
    jackknife.
    """
    n = scores.size
    observed = float(_call(statistic, scores[None])[0])
    if not np.isfinite(observed):
        raise DataError(f"The statistic is {observed} on the observed scores.")
    rows = max(1, CELLS // n)
    values = np.empty(n_bootstrap)
    for number, start in enumerate(range(0, n_bootstrap, rows)):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, number])))
        stop = min(start + rows, n_bootstrap)
        values[start:stop] = _call(statistic, scores[rng.integers(0, n, (stop - start, n))])
    law, flags = _empirical(values, "statistic")
    return observed, _left_out(scores, statistic, rows), law, flags


def _left_out(scores: Floats, statistic: Callable[[Floats], Floats], rows: int) -> Floats:
    n = scores.size
    if n < 2:
        return np.empty(0)
    out = np.empty(n)
    keep = np.arange(n - 1)
    for start in range(0, n, rows):
        without = np.arange(start, min(start + rows, n))[:, None]
        out[start : start + rows] = _call(statistic, scores[keep + (keep >= without)])
    return out


def _call(statistic: Callable[[Floats], Floats], samples: Floats) -> Floats:
    values = np.asarray(statistic(samples), dtype=np.float64)
    if values.shape != (len(samples),):
        raise DataError(
            f"statistic maps {samples.shape} to {values.shape}, expected ({len(samples)},). "
            "Reduce the last axis: lambda x: np.median(x, axis=-1)."
        )
    return values


def _empirical(values: Floats, name: str) -> tuple[Law, list[str]]:
    """Resamples without a value (an empty slice) are left out, and said so."""
    defined = np.isfinite(values)
    if defined.all():
        return EmpiricalLaw(values), []
    if defined.mean() < 0.5:
        raise DataError(f"{name} is undefined in {(~defined).mean():.0%} of the resamples.")
    return EmpiricalLaw(values[defined]), ["undefined_resamples"]
