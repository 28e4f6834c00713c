"""The one function that decides: PROMOTE, REJECT, or INCONCLUSIVE with what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

from bem.config import GatesConfig
from bem.stats.costs import cost_checks
from bem.stats.effects import Judged, all_effects, default_family, margin_of, names_of
from bem.stats.measurement import Measurement
from bem.stats.power import more_examples
from bem.stats.scores import METRICS, Metric
from bem.stats.verdict import Check, Decision, Effect, Verdict

MAX_LEFT_SKEW = 1 / 30
"""A gain is believed while n >= 25 skewness^2 (Cochran 1977, sec. 2.15): acceleration >= -1/30.

Beyond it a few large losses, seen or not, decide the mean: with log-normal losses and n = 50 a
null variant would pass 6 times in 100.
"""


def judge(
    baseline: Measurement | None,
    candidates: Mapping[str, Measurement],
    gates: GatesConfig | None = None,
    family: Sequence[str] | None = None,
) -> dict[str, Verdict]:
    """Compare every candidate with the baseline on the same examples.

    PROMOTE: every gate passed. Quality passes if in one primary metric the BCa lower limit exceeds
    the margin, Benjamini-Hochberg rejects over candidates x family, and the exact sign-flip test
    agrees, on at least `min_items` independent examples of which `min_discordant` differ, and no
    few large losses decide the mean.

    REJECT: a gate is definitely failed. That is: over budget; over memory; a latency or cache
    interval wholly beyond its limit; a core metric or a slice wholly below its margin; or quality:
    in every primary metric the upper limit lies below the smallest useful gain.

    INCONCLUSIVE: anything else. What cannot be computed (no baseline, other examples, NaN, too few)
    is open, never passed.

    Args:
        family: primary metrics, declared before looking; None: the baseline's core metrics.
    """
    gates = gates or GatesConfig.model_validate({})
    if baseline is None:
        return {name: _without_baseline(name, gates) for name in candidates}
    family = tuple(family) if family is not None else default_family(baseline)
    judged = all_effects(baseline, candidates, gates, family)
    return {
        name: _verdict(name, baseline, candidate, judged[name], gates, family, len(candidates))
        for name, candidate in candidates.items()
    }


def _verdict(
    name: str, baseline: Measurement, candidate: Measurement, judged: Judged,
    gates: GatesConfig, family: Sequence[str], n_candidates: int,
) -> Verdict:  # fmt: skip
    size = n_candidates * len(family)
    checks = [
        _quality(judged, gates, family, size, baseline.n),
        *_regressions(baseline, judged, gates),
        *_slices(baseline, judged, gates, family),
        *cost_checks(baseline, candidate, gates),
    ]
    decision = _decide(checks)
    counts = [c.n_more for c in checks if c.passed is None and c.n_more is not None]
    n_more = max(counts, default=None) if decision == "INCONCLUSIVE" else None
    return Verdict(
        name, baseline.name, decision, tuple(checks), judged.effects,
        n_more, gates.alpha, size, tuple(gates.waived),
    )  # fmt: skip


def _decide(checks: Sequence[Check]) -> Decision:
    if any(c.passed is False for c in checks):
        return "REJECT"
    return "PROMOTE" if all(c.passed for c in checks) else "INCONCLUSIVE"


def _quality(
    judged: Judged, gates: GatesConfig, family: Sequence[str], size: int, total: int
) -> Check:
    """Passed by one primary metric; failed when no primary metric can hold a useful gain."""
    primary = [e for e in judged.effects if e.primary]
    missing = [f"{m}: {judged.problems[m]}" for m in family if m in judged.problems]
    if not primary:
        return Check(
            "quality", None, "cannot be computed: " + " ".join(missing or ["no primary metric."])
        )
    tests = {e.metric: _shortfalls(e, gates) for e in primary}
    winners = [e for e in primary if not tests[e.metric]]
    best = min(winners or primary, key=lambda e: (e.gain <= 0, e.p_value))
    margin = margin_of(_meaning(best), gates.quality_margin)
    numbers = {
        "value": best.gain, "limit": margin, "ci_low": best.ci_low, "ci_high": best.ci_high,
        "p_value": best.p_value, "adjusted_p": best.adjusted_p,
    }  # fmt: skip
    said = "; ".join(
        f"{_in_words(e)}{' but ' + ', '.join(tests[e.metric]) if tests[e.metric] else ' passes'}"
        for e in primary
    )
    said += "".join(f"; {m}" for m in missing) + f". Family of {size}."
    if winners:
        return Check("quality", True, said, **numbers)
    if not missing and all(_no_useful_gain(e, gates) for e in primary):
        useful = f"the smallest useful gain ({gates.useful_gain_points:g} points)"
        return Check("quality", False, f"{said} Every upper limit is below {useful}.", **numbers)
    more = [m for e in primary if (m := _n_more(e, gates, size, total)) is not None]
    return Check("quality", None, said, **numbers, n_more=min(more, default=None))


def _shortfalls(e: Effect, gates: GatesConfig) -> list[str]:
    """What keeps a primary metric from passing, in words; empty if nothing does."""
    margin = margin_of(_meaning(e), gates.quality_margin)
    out = _too_few(e, gates)
    if "degenerate" in e.flags:
        out.append("all differences are equal")
    if e.acceleration < -MAX_LEFT_SKEW:
        out.append(f"a few large losses decide the mean (acceleration {e.acceleration:.3f})")
    if not e.ci_low > margin:
        out.append(f"lower limit is not above {margin:g}")
    if not e.rejected:
        out.append(f"adjusted p is above {gates.alpha:g}")
    if e.exact_p_greater is None:
        out.append("no exact test applies")
    elif e.exact_p_greater > gates.alpha / 2:
        out.append("the exact test shows no gain")
    return out


def _too_few(e: Effect, gates: GatesConfig) -> list[str]:
    out = []
    if e.n < gates.min_items:
        out.append(f"only {e.n} independent examples of {gates.min_items}")
    if e.discordant < gates.min_discordant:
        out.append(f"only {e.discordant} examples differ of {gates.min_discordant}")
    return out


def _no_useful_gain(e: Effect, gates: GatesConfig) -> bool:
    """The interval excludes a gain worth having (without points: any gain over the margin)."""
    if _too_few(e, gates):
        return False
    meaning = _meaning(e)
    margin = margin_of(meaning, gates.quality_margin)
    return e.ci_high < max(margin, margin_of(meaning, gates.useful_gain_points))


def _n_more(e: Effect, gates: GatesConfig, size: int, total: int) -> int | None:
    """Examples until the margin is cleared, or a useful gain excluded, whichever is nearer."""
    if e.n < gates.min_items:
        return _examples(gates.min_items - e.n, e, total)
    if e.discordant < gates.min_discordant:
        return _examples(e.n * gates.min_discordant / max(e.discordant, 1) - e.n, e, total)
    if e.acceleration < -MAX_LEFT_SKEW:  # it falls with sqrt(n)
        return _examples(e.n * ((e.acceleration / MAX_LEFT_SKEW) ** 2 - 1), e, total)
    meaning = _meaning(e)
    margin = margin_of(meaning, gates.quality_margin)
    useful = max(margin, margin_of(meaning, gates.useful_gain_points))
    roads = [
        more_examples(e.gain - margin, e.se, e.n, gates.alpha / size, gates.power),
        more_examples(useful - e.gain, e.se, e.n, gates.alpha, gates.power),
    ]
    return min((_examples(n, e, total) for n in roads if n is not None), default=None)


def _examples(units: float, e: Effect, total: int) -> int:
    """Held-out examples that hold so many more units (clusters, members of a slice); at least 1."""
    return max(1, ceil(units * total / e.n))


def _regressions(baseline: Measurement, judged: Judged, gates: GatesConfig) -> list[Check]:
    """No core metric may have fallen by more than the margin."""
    checks = []
    for metric in names_of(baseline):
        meaning = METRICS[metric] if metric in baseline.corpus else baseline.metric(metric)
        if not meaning.core:
            continue
        name = f"regression.{metric}"
        checks.append(
            _guard(name, metric, None, judged, gates, gates.regression_margin_points, baseline.n)
        )
    return checks


def _slices(
    baseline: Measurement, judged: Judged, gates: GatesConfig, family: Sequence[str]
) -> list[Check]:
    """No named slice may have fallen by more than its margin, in any primary metric with points."""
    if "slices" in gates.waived:
        return []
    guarded = [s for s in baseline.slices if s not in gates.reported_slices]
    checks = []
    for part in guarded:
        for metric in family:
            if (
                metric in names_of(baseline)
                and not (METRICS.get(metric) or baseline.metric(metric)).core
            ):
                continue
            name = f"slice.{part}.{metric}"
            checks.append(
                _guard(name, metric, part, judged, gates, gates.slice_margin_points, baseline.n)
            )
    return checks


def _guard(
    name: str,
    metric: str,
    part: str | None,
    judged: Judged,
    gates: GatesConfig,
    points: float,
    total: int,
) -> Check:
    """Non-inferiority: the lower limit lies above minus the margin."""
    found = [e for e in judged.effects if (e.metric, e.slice) == (metric, part)]
    if not found:
        problem = judged.problems.get(
            metric if part is None else f"{metric}@{part}", "not measured."
        )
        return Check(name, None, f"cannot be computed: {problem}")
    e = found[0]
    if e.n < gates.min_items:
        return Check(name, None, f"only {e.n} independent examples of {gates.min_items}.",
                     n_more=_examples(gates.min_items - e.n, e, total))  # fmt: skip
    limit = -margin_of(_meaning(e), points)
    passed = True if e.ci_low >= limit else False if e.ci_high < limit else None
    more = None
    if passed is None:
        units = more_examples(e.gain - limit, e.se, e.n, gates.alpha, gates.power)
        more = _examples(units, e, total) if units is not None else None
    reason = f"{_in_words(e)}; the lower limit may be {_shown(e, limit)}."
    return Check(name, passed, reason, e.gain, limit, e.ci_low, e.ci_high, e.p_value, None, more)


def _in_words(e: Effect) -> str:
    p = f", p {e.p_value:.3g}"
    if e.adjusted_p is not None:
        p += f", adjusted {e.adjusted_p:.3g}"
    if e.exact_p is not None:
        p += f", exact {e.exact_p:.3g}"
    where = f"n {e.examples}" + (f" in {e.n} clusters" if e.n < e.examples else "")
    return (
        f"{e.metric} {_shown(e, e.gain)} [{_shown(e, e.ci_low)}, {_shown(e, e.ci_high)}]"
        f"{' points' if e.points_per_unit else ''}{p}, {where}, MDE {_shown(e, e.mde)}"
    )


def _shown(e: Effect, value: float) -> str:
    return f"{value * e.points_per_unit:+.2f}" if e.points_per_unit else f"{value:+.4f}"


def _meaning(e: Effect) -> Metric:
    return Metric(True, e.points_per_unit)  # gains are turned already: higher is better


def _without_baseline(name: str, gates: GatesConfig) -> Verdict:
    check = Check("baseline", None, "cannot be computed: there is no baseline to compare with.")
    return Verdict(
        name, None, "INCONCLUSIVE", (check,), (), None, gates.alpha, 0, tuple(gates.waived)
    )
