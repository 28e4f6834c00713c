"""The one function that decides: PROMOTE, REJECT, or INCONCLUSIVE with what is missing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from bem.config import GatesConfig
from bem.stats.comparisons import names_of
from bem.stats.costs import cost_checks
from bem.stats.effects import Judged, all_effects, default_family, guarded_slices
from bem.stats.guards import guard_checks
from bem.stats.measurement import Measurement
from bem.stats.pairing import shared_groups
from bem.stats.quality import quality_check
from bem.stats.verdict import Check, Decision, Verdict


def judge(
    baseline: Measurement | None,
    candidates: Mapping[str, Measurement],
    gates: GatesConfig | None = None,
    family: Sequence[str] | None = None,
    routed: Collection[str] = (),
) -> dict[str, Verdict]:
    """Compare every candidate with the baseline on the same examples.

    PROMOTE: every gate passed. Quality passes if in one primary metric the BCa lower limit exceeds
    the margin, Benjamini-Hochberg rejects over candidates x family, and the exact sign-flip test
    agrees, on enough examples of which enough differ, and no few large losses decide the mean. No
    metric and no slice was harmed (`bem.stats.guards`).

    REJECT: a gate is definitely failed: over budget or memory; a latency or cache interval wholly
    beyond its limit; harm shown in a metric or a slice, by a test over all of them; or in every
    primary metric the upper limit lies below the smallest useful gain.

    INCONCLUSIVE: anything else. What cannot be computed (no baseline, other examples, NaN, too few)
    is open, never passed. Clusters and slices that one arm names hold for all; a candidate that
    contradicts them, or scores in another unit, is open for that reason.

    Args:
        family: primary metrics, declared before looking; None: the baseline's core metrics.
        routed: candidates that route between experts: what they lack leaves a router's gates open.
    Raises:
        ValueError: `routed` names no candidate.
    """
    gates = gates or GatesConfig.model_validate({})
    if strangers := sorted(set(routed) - set(candidates)):
        raise ValueError(f"routed names no candidate: {', '.join(strangers)}.")
    if baseline is None:
        return {name: _without_baseline(name, gates) for name in candidates}
    family = tuple(family) if family is not None else default_family(baseline)
    baseline, contradictions = shared_groups(baseline, candidates)
    judged = all_effects(baseline, candidates, gates, family, contradictions)
    return {
        name: _verdict(
            baseline, candidate, judged[name], gates, family, len(candidates) * len(family),
            cost_checks(baseline, candidate, gates, baseline.clusters, name in routed), name,
        )
        for name, candidate in candidates.items()
    }  # fmt: skip


def _verdict(
    baseline: Measurement, candidate: Measurement, judged: Judged, gates: GatesConfig,
    family: Sequence[str], size: int, costs: list[Check], name: str,
) -> Verdict:  # fmt: skip
    checks = [
        quality_check(judged, gates, family, size, baseline.n),
        *guard_checks(baseline, judged, gates, family),
        *costs,
    ]
    decision = _decide(checks)
    counts = [c.n_more for c in checks if c.passed is None and c.n_more is not None]
    n_more = max(counts, default=None) if decision == "INCONCLUSIVE" else None
    return Verdict(
        name, baseline.name, decision, tuple(checks), judged.effects, n_more, gates.alpha, size,
        tuple(gates.waived), tuple(_not_judged(baseline, candidate, gates)),
    )  # fmt: skip


def _decide(checks: Sequence[Check]) -> Decision:
    if any(c.passed is False for c in checks):
        return "REJECT"
    return "PROMOTE" if all(c.passed for c in checks) else "INCONCLUSIVE"


def _not_judged(baseline: Measurement, candidate: Measurement, gates: GatesConfig) -> list[str]:
    """What stands in the measurements but under no gate."""
    measured, theirs = names_of(baseline), names_of(candidate)
    unguarded = set(baseline.slices) - set(guarded_slices(baseline, gates))
    return [
        *(f"metric {m}: reported only" for m in measured if m in gates.reported_metrics),
        *(f"metric {m}: {baseline.name} has none" for m in theirs if m not in measured),
        *(f"slice {s}: reported only" for s in baseline.slices if s in unguarded),
    ]


def _without_baseline(name: str, gates: GatesConfig) -> Verdict:
    check = Check("baseline", None, "cannot be computed: there is no baseline to compare with.")
    return Verdict(
        name, None, "INCONCLUSIVE", (check,), (), None, gates.alpha, 0, tuple(gates.waived)
    )
