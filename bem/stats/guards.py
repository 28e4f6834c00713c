"""The joint guard: no metric and no slice may have been harmed by what helps the whole.

REJECT needs harm that is shown: some part lies beyond its margin, by Holm's test over all metrics
and slices at once. A part passes by its lower limit. Alike parts lend each other strength for it:
the slices of a metric, and the metrics of the whole set, each stand in a random-effects model; a
part that differs from the others keeps its own, wide interval. What the others lend cannot excuse a
severe loss: a part that is large enough must exclude that by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtr, stdtrit

from bem.config import GatesConfig
from bem.stats.bootstrap import Bca
from bem.stats.comparisons import meaning_of, names_of
from bem.stats.effects import Estimate, Judged, guarded_slices, margin_of
from bem.stats.fdr import holm
from bem.stats.inputs import Floats
from bem.stats.measurement import Measurement
from bem.stats.power import more_examples
from bem.stats.quality import further, too_few
from bem.stats.random_effects import shrink
from bem.stats.verdict import Check, Effect, Kind

OUTLYING_LEVEL = 0.05
"""Chance that among alike parts any is held to be outlying; over all models of a candidate."""
SPREAD_LEVEL = 0.1
"""Chance that alike parts are held to differ at all. The median-unbiased spread (0.5) would take back
most of what small slices lend each other: few of them cannot disprove a spread of several points."""
PRIOR_UNITS = 20
"""A slice's variance is taken as if it held so many units more that vary like the whole set: of 30
answers that never differ the variance is not 0."""
ROUNDING = 1e-9
"""Relative: a limit this close to its margin is on it."""


@dataclass(frozen=True)
class Guard:
    """A part that must not have been harmed: a metric, on the whole set or on a slice."""

    kind: Kind
    estimate: Estimate
    margin: float
    """The lower limit may lie so far below 0, in the metric's units."""
    severe: float | None
    """Loss that the part must exclude by itself; None: it is too small, or has no points."""

    @property
    def effect(self) -> Effect:
        return self.estimate.effect


@dataclass(frozen=True)
class Limit:
    """What is known of a part once the others have lent their strength, in its units."""

    estimate: float
    se: float
    low: float
    high: float
    own_se: float
    """Standard error of the part by itself, of small slices moderated."""
    lenders: int = 0
    """Parts in the same model; 0: it stands alone, the limits are its own BCa interval."""


def guard_checks(
    baseline: Measurement, judged: Judged, gates: GatesConfig, family: Sequence[str]
) -> list[Check]:
    """A check for every metric on the whole set, and for every primary metric on every guarded
    slice."""
    parts: list[tuple[str, str | None]] = [
        (metric, None) for metric in names_of(baseline) if metric not in gates.reported_metrics
    ]
    parts += [(metric, part) for part in guarded_slices(baseline, gates) for metric in family]
    slots = [_guard(metric, part, baseline, judged, gates) for metric, part in parts]
    guards = [slot for slot in slots if isinstance(slot, Guard)]
    limits = _limits(guards, judged, gates)
    p_harm = [_p_harm(g, limit, gates) for g, limit in zip(guards, limits, strict=True)]
    decided = iter(
        _check(guard, limit, p, adjusted, gates, baseline.n)
        for guard, limit, p, adjusted in zip(
            guards, limits, p_harm, holm(p_harm).tolist(), strict=True
        )
    )
    return [slot if isinstance(slot, Check) else next(decided) for slot in slots]


def _guard(
    metric: str, part: str | None, baseline: Measurement, judged: Judged, gates: GatesConfig
) -> Guard | Check:
    """The guard of one part, or the open check of one that cannot be judged."""
    kind: Kind = "regression" if part is None else "slice"
    estimate = judged.estimates.get((metric, part))
    if estimate is None:
        key = metric if part is None else f"{metric}@{part}"
        problem = judged.problems.get(key, f"{baseline.name} has no metric {metric}.")
        return Check(kind, None, f"cannot be computed: {problem}", metric, part)
    e = estimate.effect
    if scarce := too_few(e, gates):
        n_more = further(gates.min_items / e.effective_n - 1, baseline.n)
        return Check(kind, None, f"{scarce}.", metric, part, n_more=n_more)
    points = gates.slice_margin_points if kind == "slice" else gates.regression_margin_points
    meaning = meaning_of(baseline, metric)
    if not meaning.core:
        whole = judged.estimates[metric, None].effect
        return Guard(kind, estimate, gates.relative_margin * abs(whole.baseline), None)
    large = e.examples >= gates.severe_loss_examples
    severe = margin_of(meaning, max(points, gates.severe_loss_points)) if large else None
    return Guard(kind, estimate, margin_of(meaning, points), severe)


# --- limits -------------------------------------------------------------------------------------


def _limits(guards: Sequence[Guard], judged: Judged, gates: GatesConfig) -> list[Limit]:
    """Each part's limit, from the model of its parts or by itself."""
    limits = [
        Limit(e.gain, e.se, e.ci_low, e.ci_high, e.se) for e in (guard.effect for guard in guards)
    ]
    groups: dict[str | None, list[int]] = {}
    for i, guard in enumerate(guards):
        if guard.kind == "slice":
            groups.setdefault(guard.effect.metric, []).append(i)
        elif guard.effect.points_per_unit:  # on the whole set: metrics with a common unit
            groups.setdefault(None, []).append(i)
    models = sum(len(m) + (key in judged.remainders) > 1 for key, m in groups.items())
    for metric, members in groups.items():
        inside = [guards[i] for i in members]
        if metric is None:
            lent = _of_metrics(inside, gates, max(models, 1))
        else:
            lent = _of_slices(metric, inside, judged, gates, max(models, 1))
        for i, limit in zip(members, lent, strict=True):
            limits[i] = limit
    return limits


def _of_metrics(guards: list[Guard], gates: GatesConfig, models: int) -> list[Limit]:
    """Metrics of the whole set, in points."""
    scale = np.array([guard.effect.points_per_unit for guard in guards], dtype=np.float64)
    gains = np.array([guard.effect.gain for guard in guards]) * scale
    errors = np.stack([guard.estimate.deviations for guard in guards], axis=1) * scale
    return _lent(guards, gains, errors.T @ errors, scale, gates, models)


def _of_slices(
    metric: str, guards: list[Guard], judged: Judged, gates: GatesConfig, models: int
) -> list[Limit]:
    """Slices of one metric, beside whatever lies in none of them."""
    whole = judged.estimates[metric, None].effect
    gains = [guard.effect.gain for guard in guards]
    errors = [guard.estimate.deviations for guard in guards]
    examples = [guard.effect.examples for guard in guards]
    units = [guard.effect.n for guard in guards]
    rest = judged.remainders.get(metric)
    if rest is not None:
        gains.append(rest.meaning.sign * (rest.means[1] - rest.means[0]))
        errors.append(rest.deviations)
        examples.append(rest.examples)
        units.append(int(np.any(rest.statistic.columns != 0, axis=1).sum()))
    table = np.stack(errors, axis=1)
    covariance = table.T @ table
    own, size = np.diag(covariance).copy(), np.array(units)
    like_whole = whole.se**2 * whole.examples / np.array(examples)
    moderated = (PRIOR_UNITS * like_whole + size * own) / (PRIOR_UNITS + size)
    factors = np.sqrt(np.divide(moderated, own, out=np.zeros_like(own), where=own > 0))
    covariance = covariance * np.outer(factors, factors)
    np.fill_diagonal(covariance, moderated)
    return _lent(guards, np.array(gains), covariance, np.ones(len(gains)), gates, models)


def _lent(
    guards: list[Guard], gains: Floats, covariance: Floats, scale: Floats, gates: GatesConfig,
    models: int,
) -> list[Limit]:  # fmt: skip
    """Limits of the guards, which are the first of the groups, in their own units."""
    shrunk = shrink(gains, covariance, OUTLYING_LEVEL / models, SPREAD_LEVEL / models)
    own_se = np.sqrt(np.diag(covariance)) / np.resize(scale, gains.size)
    lenders = int((~shrunk.alone).sum())
    limits: list[Limit] = []
    for i, guard in enumerate(guards):
        e, own = guard.effect, float(own_se[i])
        if shrunk.alone[i]:
            limits.append(Limit(e.gain, e.se, e.ci_low, e.ci_high, own))
            continue
        mid, se = float(shrunk.estimates[i] / scale[i]), float(shrunk.se[i] / scale[i])
        reach = float(stdtrit(max(e.n - 1, 1), 1 - gates.alpha / 2)) * se
        limits.append(Limit(mid, se, mid - reach, mid + reach, own, lenders))
    return limits


# --- checks -------------------------------------------------------------------------------------


def _check(
    guard: Guard, limit: Limit, p_harm: float, adjusted_p: float, gates: GatesConfig, total: int
) -> Check:
    e = guard.effect
    check = Check(
        guard.kind, None, _described(guard, limit), e.metric, e.slice, value=e.gain,
        limit=-guard.margin, ci_low=limit.low, ci_high=limit.high, p_value=p_harm,
        adjusted_p=adjusted_p,
    )  # fmt: skip
    if adjusted_p <= gates.alpha / 2:
        harm = f" It lies below that: p {p_harm:.2g}, over all guards {adjusted_p:.2g}."
        return replace(check, passed=False, reason=check.reason + harm)
    p_severe = 0.0
    if guard.severe is not None:
        p_severe = _p_above(guard.estimate.interval, -guard.severe, gates.alpha)
    if p_severe > gates.alpha:
        loss = f" A loss of {e.show(guard.severe or 0)[1:]} is not excluded (p {p_severe:.2g})."
        check = replace(check, reason=check.reason + loss)
    elif limit.low >= -guard.margin * (1 + ROUNDING):
        return replace(check, passed=True)
    return replace(check, n_more=_n_more(guard, limit, p_severe > gates.alpha, gates, total))


def _described(guard: Guard, limit: Limit) -> str:
    e = guard.effect
    lent = ""
    if limit.lenders:
        others = "slices" if guard.kind == "slice" else "metrics"
        lent = f"with {limit.lenders - 1} alike {others} "
        lent += f"[{e.show(limit.low)}, {e.show(limit.high)}]; "
    return f"{e.text}; {lent}the lower limit may be {e.show(-guard.margin)}."


def _n_more(
    guard: Guard, limit: Limit, severe_open: bool, gates: GatesConfig, total: int
) -> int | None:
    """Examples until its limit, and where needed its own scores, clear what they have to."""
    e = guard.effect
    needs: list[int | None] = []
    if limit.low < -guard.margin * (1 + ROUNDING):
        distance = limit.estimate + guard.margin
        needs.append(more_examples(distance, limit.se, e.n, gates.alpha, gates.power))
    if severe_open and guard.severe is not None:
        distance = e.gain + guard.severe
        needs.append(more_examples(distance, e.se, e.n, min(2 * gates.alpha, 0.99), gates.power))
    counts = [n for n in needs if n is not None]
    return further(max(counts) / e.n, total) if counts and len(counts) == len(needs) else None


def _p_harm(guard: Guard, limit: Limit, gates: GatesConfig) -> float:
    """One-sided p of a part lying beyond its margin: the larger of the BCa p and that of a t-test.

    With few differing answers BCa alone is too sure (of 30 answers 7 lost and none gained: 3e-4),
    and resamples resolve no p below 1 / (B + 1)."""
    distance = guard.effect.gain + guard.margin
    interval = guard.estimate.interval
    if limit.own_se == 0:
        return float(distance >= 0)
    p = float(stdtr(max(guard.effect.n - 1, 1), distance / limit.own_se))
    if interval.law is None:
        return p
    bca = interval.at(gates.alpha, -guard.margin).p_less
    return max(p, bca) if bca > interval.law.floor else p


def _p_above(interval: Bca, bound: float, alpha: float) -> float:
    """One-sided p of the effect lying above `bound`."""
    if interval.law is None:
        return float(interval.observed <= bound)
    return interval.at(alpha, bound).p_greater
