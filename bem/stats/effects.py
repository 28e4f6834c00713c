"""Effects of all candidates on all metrics and slices: one shared resample, one FDR family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bem.config import GatesConfig
from bem.errors import DataError
from bem.stats.bootstrap import Bca, joint_bca
from bem.stats.corpus import CORPUS
from bem.stats.fdr import benjamini_hochberg_correction
from bem.stats.inputs import Floats, cluster_codes, finite, sum_by_cluster
from bem.stats.measurement import Measurement
from bem.stats.paired import SignFlip, sign_flip_tests, swap_test
from bem.stats.power import minimal_detectable_effect
from bem.stats.scores import METRICS, Metric
from bem.stats.verdict import Effect
from bem.stats.weights import Statistic, ratio


@dataclass(frozen=True)
class Judged:
    """Effects of one candidate, and what could not be computed and why."""

    effects: tuple[Effect, ...]
    problems: Mapping[str, str]
    """metric (or metric@slice) -> reason."""


@dataclass(frozen=True)
class _Comparison:
    """One candidate, metric and slice, ready to be resampled."""

    candidate: str
    metric: str
    slice: str | None
    statistic: Statistic
    means: tuple[float, float]
    """Baseline and candidate score."""
    discordant: int
    examples: int
    meaning: Metric


def names_of(measurement: Measurement) -> list[str]:
    """Every metric measured, corpus metrics included."""
    return [*measurement.metrics, *(k for k in measurement.corpus if k not in measurement.metrics)]


def default_family(baseline: Measurement) -> tuple[str, ...]:
    """Core metrics of the baseline (those with points); all its metrics if it has no core one."""
    names = names_of(baseline)
    core = [name for name in names if _meaning(baseline, name).core]
    return tuple(core or names)


def margin_of(meaning: Metric, points: float) -> float:
    """`points` in the metric's own units; 0 for a metric without points."""
    return points / meaning.points_per_unit if meaning.points_per_unit else 0.0


def all_effects(
    baseline: Measurement,
    candidates: Mapping[str, Measurement],
    gates: GatesConfig,
    family: Sequence[str],
) -> dict[str, Judged]:
    """Every effect of every candidate; the family's with adjusted p, exact p and FCR interval."""
    comparisons: list[_Comparison] = []
    problems: dict[str, dict[str, str]] = {name: {} for name in candidates}
    for name, candidate in candidates.items():
        for metric in dict.fromkeys([*names_of(baseline), *family]):
            for part in (None, *baseline.slices):
                try:
                    comparisons.append(_compare(name, baseline, candidate, metric, part))
                except DataError as error:
                    problems[name][metric if part is None else f"{metric}@{part}"] = str(error)
    margins = [margin_of(c.meaning, gates.quality_margin) for c in comparisons]
    intervals = joint_bca(
        [c.statistic for c in comparisons],
        gates.n_bootstrap, gates.alpha, gates.seed, margins=margins,
    )  # fmt: skip
    effects = [
        _effect(c, bca, gates, c.slice is None and c.metric in family)
        for c, bca in zip(comparisons, intervals, strict=True)
    ]
    effects = _second_opinion(comparisons, effects, margins, baseline, candidates, gates)
    size = len(candidates) * len(family)
    effects = _corrected(effects, intervals, gates, size)
    return {
        name: Judged(
            tuple(e for c, e in zip(comparisons, effects, strict=True) if c.candidate == name),
            problems[name],
        )
        for name in candidates
    }


def _compare(
    name: str, baseline: Measurement, candidate: Measurement, metric: str, part: str | None
) -> _Comparison:
    place = candidate.aligned_to(baseline.example_ids)
    codes = cluster_codes(baseline.clusters, baseline.n)
    mask = np.ones(baseline.n) if part is None else np.asarray(baseline.slices[part], dtype=float)
    if not mask.any():
        raise DataError(f"slice {part} has no examples.")
    meaning = _meaning(baseline, metric)
    label = f"{name}: {metric}" + (f" on {part}" if part else "")
    if metric in CORPUS and metric not in baseline.metrics:
        new, old = _corpus_pair(baseline, candidate, metric, place)
        inside = mask.astype(bool)[:, None]
        columns = np.concatenate([_flat(new), _flat(old)], axis=1) * inside
        scores = [float(CORPUS[metric][1](x[:, mask > 0].sum(axis=1)).mean()) for x in (old, new)]
        of = _corpus_gain(metric, len(new), len(old))
        differ = ((new - old) * inside != 0).any(axis=(0, 2))
    else:
        new, old = _score_pair(baseline, candidate, metric, place)
        gain = meaning.sign * (new - old)
        columns = np.stack([gain * mask, mask], axis=1)
        scores = [float(x[mask > 0].mean()) for x in (old, new)]
        of = ratio
        differ = np.abs(gain * mask) > 1e-12
    statistic = Statistic(label, sum_by_cluster(columns, codes), of)
    units = np.flatnonzero(differ) if codes is None else np.unique(codes[differ])
    return _Comparison(
        name, metric, part, statistic, (scores[0], scores[1]), units.size, int(mask.sum()), meaning
    )


def _score_pair(
    baseline: Measurement, candidate: Measurement, metric: str, place: np.ndarray
) -> tuple[Floats, Floats]:
    """Candidate's and baseline's scores [examples], averaged over seeds."""
    pair = []
    for side, order in ((candidate, place), (baseline, np.arange(baseline.n))):
        if metric not in side.metrics:
            raise DataError(f"{side.name} has no metric {metric}.")
        scores = finite(f"{side.name}: metrics.{metric}", side.metrics[metric], 2)
        pair.append(scores[:, order].mean(axis=0))
    return pair[0], pair[1]


def _corpus_pair(
    baseline: Measurement, candidate: Measurement, metric: str, place: np.ndarray
) -> tuple[Floats, Floats]:
    """Candidate's and baseline's statistics [seeds, examples, k]."""
    pair = []
    for side, order in ((candidate, place), (baseline, np.arange(baseline.n))):
        if metric not in side.corpus:
            raise DataError(f"{side.name} has no sufficient statistics of {metric}.")
        pair.append(finite(f"{side.name}: corpus.{metric}", side.corpus[metric], 3)[:, order])
    return pair[0], pair[1]


def _corpus_gain(metric: str, new_seeds: int, old_seeds: int) -> Callable[[Floats], Floats]:
    width, score = CORPUS[metric]

    def gain(sums: Floats) -> Floats:
        sides = sums.reshape(*sums.shape[:-1], new_seeds + old_seeds, width)
        values = score(sides)
        return values[..., :new_seeds].mean(axis=-1) - values[..., new_seeds:].mean(axis=-1)

    return gain


def _effect(c: _Comparison, bca: Bca, gates: GatesConfig, primary: bool) -> Effect:
    return Effect(
        metric=c.metric, slice=c.slice, primary=primary, baseline=c.means[0], candidate=c.means[1],
        gain=bca.observed, ci_low=bca.lower, ci_high=bca.upper,
        points_per_unit=c.meaning.points_per_unit, p_value=bca.p_value,
        n=bca.n, examples=c.examples, se=bca.se,
        mde=minimal_detectable_effect(bca.se, gates.alpha, gates.power), engine=bca.engine,
        acceleration=bca.acceleration, flags=bca.flags, discordant=c.discordant,
    )  # fmt: skip


def _second_opinion(
    comparisons: list[_Comparison], effects: list[Effect], margins: list[float],
    baseline: Measurement, candidates: Mapping[str, Measurement], gates: GatesConfig,
) -> list[Effect]:  # fmt: skip
    """Adds the exact tests; all means share their signs."""
    tests: dict[int, SignFlip] = {}
    primary = [i for i, e in enumerate(effects) if e.primary]
    means = [i for i in primary if comparisons[i].statistic.of is ratio]
    if means:
        columns = [comparisons[i].statistic.columns for i in means]
        shifted = [x[:, 0] - margins[i] * x[:, 1] for i, x in zip(means, columns, strict=True)]
        table = np.stack(shifted, axis=1)
        table[np.abs(table) < 1e-12] = 0.0
        tests.update(zip(means, sign_flip_tests(table, gates.n_bootstrap, gates.seed), strict=True))
    for i in primary:
        c = comparisons[i]
        if c.statistic.of is ratio or margins[i] > 0:
            continue  # a swap of sides knows no margin: a corpus metric with one stays unconfirmed
        place = candidates[c.candidate].aligned_to(baseline.example_ids)
        new, old = _corpus_pair(baseline, candidates[c.candidate], c.metric, place)
        if len(new) != len(old):
            continue  # sides with different seeds cannot be swapped
        of = CORPUS[c.metric][1]
        tests[i] = swap_test(
            new, old, of, clusters=baseline.clusters, n_resamples=gates.n_bootstrap, seed=gates.seed
        )
    return [
        replace(e, exact_p=tests[i].p_value, exact_p_greater=tests[i].p_greater)
        if i in tests
        else e
        for i, e in enumerate(effects)
    ]


def _corrected(
    effects: list[Effect], intervals: list[Bca], gates: GatesConfig, family_size: int
) -> list[Effect]:
    """Adds adjusted p and FCR intervals; what could not be computed counts with p = 1."""
    primary = [i for i, e in enumerate(effects) if e.primary]
    if not primary:
        return effects
    p = np.ones(max(family_size, len(primary)))
    p[: len(primary)] = [effects[i].p_value for i in primary]
    found = benjamini_hochberg_correction(p, gates.alpha, gates.fdr)
    out = list(effects)
    for k, i in enumerate(primary):
        rejected = bool(found.rejected[k])
        adjusted = replace(
            effects[i], adjusted_p=float(found.adjusted_p_values[k]), rejected=rejected
        )
        if rejected and intervals[i].law is not None:
            selected = intervals[i].at(found.fcr_level)
            adjusted = replace(adjusted, fcr_low=selected.lower, fcr_high=selected.upper)
        out[i] = adjusted
    return out


def _meaning(measurement: Measurement, name: str) -> Metric:
    return METRICS[name] if name in CORPUS else measurement.metric(name)


def _flat(statistics: Floats) -> Floats:
    """[seeds, n, k] to [n, seeds * k]."""
    seeds, n, k = statistics.shape
    return statistics.transpose(1, 0, 2).reshape(n, seeds * k)
