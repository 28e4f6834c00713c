"""Effects of all candidates on all metrics and slices: one shared resample, one FDR family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from bem.config import GatesConfig
from bem.errors import DataError
from bem.stats.bootstrap import Bca, joint_bca
from bem.stats.comparisons import (
    Comparison,
    compare,
    corpus_pair,
    meaning_of,
    names_of,
)
from bem.stats.corpus import CORPUS
from bem.stats.fdr import benjamini_hochberg_correction
from bem.stats.inputs import Floats, cluster_codes, difference
from bem.stats.measurement import Measurement
from bem.stats.paired import SignFlip, sign_flip_tests, swap_test
from bem.stats.power import minimal_detectable_effect
from bem.stats.scores import Metric
from bem.stats.verdict import Effect
from bem.stats.weights import ratio


@dataclass(frozen=True)
class Estimate:
    """An effect with what the joint guards need beyond its interval."""

    effect: Effect
    interval: Bca
    deviations: Floats
    """[units]: see `Comparison`."""


@dataclass(frozen=True)
class Judged:
    """Effects of one candidate, and what could not be computed and why."""

    estimates: Mapping[tuple[str, str | None], Estimate] = field(default_factory=dict)
    """(metric, slice) -> estimate."""
    remainders: Mapping[str, Comparison] = field(default_factory=dict)
    """metric -> gain on the examples that lie in no guarded slice, if there are any."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """metric (or metric@slice) -> reason."""

    @property
    def effects(self) -> tuple[Effect, ...]:
        return tuple(e.effect for e in self.estimates.values())


def default_family(baseline: Measurement) -> tuple[str, ...]:
    """Core metrics of the baseline (those with points); all its metrics if it has no core one."""
    names = names_of(baseline)
    core = [name for name in names if meaning_of(baseline, name).core]
    return tuple(core or names)


def margin_of(meaning: Metric, points: float) -> float:
    """`points` in the metric's own units; 0 for a metric without points."""
    return points / meaning.points_per_unit if meaning.points_per_unit else 0.0


def guarded_slices(baseline: Measurement, gates: GatesConfig) -> list[str]:
    """Named slices that are guards, not only reported."""
    if "slices" in gates.waived:
        return []
    return [name for name in baseline.slices if name not in gates.reported_slices]


def all_effects(
    baseline: Measurement,
    candidates: Mapping[str, Measurement],
    gates: GatesConfig,
    family: Sequence[str],
    contradictions: Mapping[str, str],
) -> dict[str, Judged]:
    """Every effect of every candidate; the family's with adjusted p, exact p and FCR interval.

    Args:
        baseline: with the groups of all arms, see `bem.stats.pairing`.
        contradictions: candidate -> why none of its effects can be computed.
    """
    metrics = list(dict.fromkeys([*names_of(baseline), *family]))
    guarded = guarded_slices(baseline, gates)
    sides = {
        name: _Side(name, baseline, candidate, guarded, metrics, contradictions.get(name))
        for name, candidate in candidates.items()
    }
    comparisons = [c for side in sides.values() for c in side.comparisons]
    estimates = _estimates(comparisons, baseline, candidates, gates, family)
    return {
        name: Judged(
            {
                (e.effect.metric, e.effect.slice): e
                for c, e in zip(comparisons, estimates, strict=True)
                if c.candidate == name
            },
            side.remainders,
            side.problems,
        )
        for name, side in sides.items()
    }


class _Side:
    """All comparisons of one candidate, and why others are impossible."""

    def __init__(
        self, name: str, baseline: Measurement, candidate: Measurement,
        guarded: Sequence[str], metrics: Sequence[str], contradiction: str | None,
    ):  # fmt: skip
        self.comparisons: list[Comparison] = []
        self.remainders: dict[str, Comparison] = {}
        self.problems: dict[str, str] = {}
        parts: dict[str | None, NDArray[np.bool_]] = {None: np.ones(baseline.n, dtype=bool)}
        parts |= {part: np.asarray(mask, dtype=bool) for part, mask in baseline.slices.items()}
        outside = ~np.logical_or.reduce([parts[part] for part in guarded or [None]])
        codes = cluster_codes(baseline.clusters, baseline.n)
        try:
            if contradiction:
                raise DataError(contradiction)
            place = candidate.aligned_to(baseline.example_ids)
        except DataError as error:
            self.problems = {_key(m, part): str(error) for m in metrics for part in parts}
            return
        for metric in metrics:
            for part, mask in parts.items():
                try:
                    self.comparisons.append(
                        compare(name, baseline, candidate, metric, part, mask, codes, place)
                    )
                except DataError as error:
                    self.problems[_key(metric, part)] = str(error)
            if outside.any() and metric not in self.problems:
                self.remainders[metric] = compare(
                    name, baseline, candidate, metric, "no slice", outside, codes, place
                )


def _key(metric: str, part: str | None) -> str:
    return metric if part is None else f"{metric}@{part}"


def _estimates(
    comparisons: list[Comparison], baseline: Measurement, candidates: Mapping[str, Measurement],
    gates: GatesConfig, family: Sequence[str],
) -> list[Estimate]:  # fmt: skip
    margins = [margin_of(c.meaning, gates.quality_margin) for c in comparisons]
    intervals = joint_bca(
        [c.statistic for c in comparisons],
        gates.n_bootstrap, gates.alpha, gates.seed, margins=margins,
    )  # fmt: skip
    effects = [
        _effect(c, bca, gates, c.slice is None and c.metric in family)
        for c, bca in zip(comparisons, intervals, strict=True)
    ]
    tests = _exact_tests(comparisons, effects, margins, baseline, candidates, gates)
    effects = [
        replace(e, exact_p=tests[i].p_value, exact_p_greater=tests[i].p_greater)
        if i in tests
        else e
        for i, e in enumerate(effects)
    ]
    effects = _corrected(effects, intervals, gates, len(candidates) * len(family))
    return [
        Estimate(e, bca, c.deviations)
        for e, bca, c in zip(effects, intervals, comparisons, strict=True)
    ]


def _effect(c: Comparison, bca: Bca, gates: GatesConfig, primary: bool) -> Effect:
    return Effect(
        metric=c.metric, slice=c.slice, primary=primary, baseline=c.means[0], candidate=c.means[1],
        gain=bca.observed, ci_low=bca.lower, ci_high=bca.upper,
        points_per_unit=c.meaning.points_per_unit, p_value=bca.p_value, n=bca.n,
        effective_n=c.effective_n, examples=c.examples, se=bca.se,
        mde=minimal_detectable_effect(bca.se, gates.alpha, gates.power), engine=bca.engine,
        acceleration=bca.acceleration, flags=bca.flags, discordant=c.discordant,
    )  # fmt: skip


def _exact_tests(
    comparisons: list[Comparison], effects: list[Effect], margins: list[float],
    baseline: Measurement, candidates: Mapping[str, Measurement], gates: GatesConfig,
) -> dict[int, SignFlip]:  # fmt: skip
    """The exact test of each primary effect by its place; all means share their signs."""
    tests: dict[int, SignFlip] = {}
    primary = [i for i, e in enumerate(effects) if e.primary]
    means = [i for i in primary if comparisons[i].statistic.of is ratio]
    if means:
        columns = [comparisons[i].statistic.columns for i in means]
        shifted = [
            difference(x[:, 0], margins[i] * x[:, 1]) for i, x in zip(means, columns, strict=True)
        ]
        table = np.stack(shifted, axis=1)
        tests.update(zip(means, sign_flip_tests(table, gates.n_bootstrap, gates.seed), strict=True))
    for i in primary:
        c = comparisons[i]
        if c.statistic.of is ratio or margins[i] > 0:
            continue  # a swap of sides knows no margin: a corpus metric with one stays unconfirmed
        place = candidates[c.candidate].aligned_to(baseline.example_ids)
        new, old = corpus_pair(baseline, candidates[c.candidate], c.metric, place)
        if len(new) != len(old):
            continue  # sides with different seeds cannot be swapped
        of = CORPUS[c.metric][1]
        tests[i] = swap_test(
            new, old, of, clusters=baseline.clusters, n_resamples=gates.n_bootstrap, seed=gates.seed
        )
    return tests


def _corrected(
    effects: list[Effect], intervals: list[Bca], gates: GatesConfig, family_size: int
) -> list[Effect]:
    """Adds adjusted p and FCR intervals; what could not be computed counts with p = 1."""
    primary = [i for i, e in enumerate(effects) if e.primary]
    if not primary:
        return effects
    p = np.ones(max(family_size, len(primary)))
    p[: len(primary)] = [effects[i].p_value for i in primary]
    discoveries = benjamini_hochberg_correction(p, gates.alpha, gates.fdr)
    out = list(effects)
    for k, i in enumerate(primary):
        rejected = bool(discoveries.rejected[k])
        adjusted = replace(
            effects[i], adjusted_p=float(discoveries.adjusted_p_values[k]), rejected=rejected
        )
        if rejected and intervals[i].law is not None:
            selected = intervals[i].at(discoveries.fcr_level)
            adjusted = replace(adjusted, fcr_low=selected.lower, fcr_high=selected.upper)
        out[i] = adjusted
    return out
