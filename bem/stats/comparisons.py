"""One candidate against the baseline on one metric and one part of the examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bem.errors import DataError
from bem.stats.corpus import CORPUS
from bem.stats.inputs import Floats, difference, finite, sum_by_cluster
from bem.stats.measurement import Measurement
from bem.stats.scores import METRICS, Metric
from bem.stats.weights import Statistic, ratio


@dataclass(frozen=True)
class Comparison:
    """A gain, ready to be resampled."""

    candidate: str
    metric: str
    slice: str | None
    statistic: Statistic
    means: tuple[float, float]
    """Baseline and candidate score."""
    discordant: int
    examples: int
    effective_n: float
    """Units of equal size that say as much (Kish 1965)."""
    meaning: Metric
    deviations: Floats
    """[units]: what each unit adds to the gain's error. Their products with those of another
    comparison sum to the jackknife covariance of the two gains."""


def names_of(measurement: Measurement) -> list[str]:
    """Every metric measured, corpus metrics included."""
    return [*measurement.metrics, *(k for k in measurement.corpus if k not in measurement.metrics)]


def meaning_of(measurement: Measurement, name: str) -> Metric:
    """What a metric's numbers mean, corpus metrics included."""
    return METRICS[name] if name in CORPUS else measurement.metric(name)


def compare(
    name: str, baseline: Measurement, candidate: Measurement, metric: str,
    part: str | None, mask: NDArray[np.bool_], codes: NDArray[np.intp] | None,
    place: NDArray[np.intp],
) -> Comparison:  # fmt: skip
    """The gain of a candidate in one metric on the examples of `mask`.

    Args:
        part: name of the slice; None: the whole set.
        mask: [examples] of the baseline.
        codes: [examples] cluster of each; None: each is its own.
        place: [examples] where the candidate holds them.
    Raises:
        DataError: nothing in the mask, a metric that one side lacks, NaN.
    """
    if not mask.any():
        raise DataError(f"slice {part} has no examples.")
    label = f"{name}: {metric}" + (f" on {part}" if part else "")
    if metric in CORPUS and metric not in baseline.metrics:
        new, old = corpus_pair(baseline, candidate, metric, place)
        columns = np.concatenate([_flat(new), _flat(old)], axis=1) * mask[:, None]
        means = [float(CORPUS[metric][1](x[:, mask].sum(axis=1)).mean()) for x in (old, new)]
        of = _corpus_gain(metric, len(new), len(old))
        differs = (new.mean(axis=0) != old.mean(axis=0)).any(axis=1)
    else:
        new, old = _score_pair(baseline, candidate, metric, place)
        gain = meaning_of(baseline, metric).sign * difference(new, old)
        columns = np.stack([gain * mask, mask.astype(np.float64)], axis=1)
        means = [float(x[mask].mean()) for x in (old, new)]
        of = ratio
        differs = gain != 0
    differs = differs & mask
    discordant = int(differs.sum()) if codes is None else np.unique(codes[differs]).size
    statistic = Statistic(label, sum_by_cluster(columns, codes), of)
    return Comparison(
        name, metric, part, statistic, (means[0], means[1]), discordant, int(mask.sum()),
        effective_units(mask, codes), meaning_of(baseline, metric), _deviations(statistic),
    )  # fmt: skip


def _deviations(statistic: Statistic) -> Floats:
    """[units] jackknife deviations, scaled so that their squares sum to the squared error."""
    columns = statistic.columns
    inside = np.any(columns != 0, axis=1)
    totals, units = columns.sum(axis=0), int(inside.sum())
    observed = float(statistic.of(totals[None])[0])
    out = np.zeros(len(columns))
    if units > 1:
        left_out = statistic.of(totals - columns[inside])
        out[inside] = (left_out.mean() - left_out) * np.sqrt((units - 1) / units)
    with np.errstate(over="ignore", invalid="ignore"):
        squared = float(out @ out)
    if not np.isfinite([observed, squared]).all():
        raise DataError(f"{statistic.name} is {observed}, with an error that is not finite.")
    return out


def effective_units(mask: NDArray[np.bool_], codes: NDArray[np.intp] | None) -> float:
    """Effective number of clusters of the examples in the mask; their number if unclustered."""
    return float(mask.sum()) if codes is None else kish(np.bincount(codes[mask]))


def kish(sizes: ArrayLike) -> float:
    """Clusters of equal size that say as much as clusters of these sizes: (sum m)^2 / sum m^2
    (Kish 1965)."""
    m = np.asarray(sizes, dtype=np.float64)
    return float(m.sum() ** 2 / (m @ m))


def corpus_pair(
    baseline: Measurement, candidate: Measurement, metric: str, place: NDArray[np.intp]
) -> tuple[Floats, Floats]:
    """Candidate's and baseline's sufficient statistics [seeds, examples, k]."""
    pair = []
    for side, order in ((candidate, place), (baseline, np.arange(baseline.n))):
        if metric not in side.corpus:
            raise DataError(f"{side.name} has no sufficient statistics of {metric}.")
        pair.append(finite(f"{side.name}: corpus.{metric}", side.corpus[metric], 3)[:, order])
    return pair[0], pair[1]


def _score_pair(
    baseline: Measurement, candidate: Measurement, metric: str, place: NDArray[np.intp]
) -> tuple[Floats, Floats]:
    """Candidate's and baseline's scores [examples], averaged over seeds."""
    pair = []
    for side, order in ((candidate, place), (baseline, np.arange(baseline.n))):
        if metric not in side.metrics:
            raise DataError(f"{side.name} has no metric {metric}.")
        scores = finite(f"{side.name}: metrics.{metric}", side.metrics[metric], 2)
        pair.append(scores[:, order].mean(axis=0))
    return pair[0], pair[1]


def _corpus_gain(metric: str, new_seeds: int, old_seeds: int) -> Callable[[Floats], Floats]:
    width, score = CORPUS[metric]

    def gain(sums: Floats) -> Floats:
        sides = sums.reshape(*sums.shape[:-1], new_seeds + old_seeds, width)
        values = score(sides)
        return values[..., :new_seeds].mean(axis=-1) - values[..., new_seeds:].mean(axis=-1)

    return gain


def _flat(statistics: Floats) -> Floats:
    """[seeds, n, k] to [n, seeds * k]."""
    seeds, n, k = statistics.shape
    return statistics.transpose(1, 0, 2).reshape(n, seeds * k)
