"""The gates on what a candidate costs: budget, latency, memory, cache hits; a router's plans; and
whether quality follows the index.

Facts that a gate needs, as fields of the Measurement of both sides; what is missing leaves it open:

budget      adapter_parameters, adapter_flops_per_token
latency     latency_ms: phase -> p50 of each interleaved round
memory      adapter_memory_bytes: peak bytes that the adapter adds to its frozen base (weights,
            state, activations); the base's own weights would hide every difference
kv_hit      kv_needed, kv_held, kv_hits, each [requests] or [seeds, requests]: cache entries that the
            decode steps of a request needed, that the cache held, and that were reused
router      router.plan_lengths (of a candidate that routes)
index_swap  router.index_swap (where there is one, and of every candidate that routes)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bem.config import GatesConfig
from bem.errors import DataError
from bem.stats.cache_hits import kv_hit_checks
from bem.stats.inputs import finite
from bem.stats.latency import paired_ratio
from bem.stats.measurement import Measurement
from bem.stats.monotone import index_swap
from bem.stats.verdict import Check, Kind

MAX_PLAN = 3
"""Most actions in a router's plan."""
COSTS: dict[str, tuple[str, ...]] = {
    "budget": ("adapter_parameters", "adapter_flops_per_token"),
    "latency": ("latency_ms",),
    "memory": ("adapter_memory_bytes",),
    "kv_hit": ("kv_hits", "kv_held", "kv_needed"),
}
"""Cost gate -> fields of a Measurement that it needs."""


def costs_not_measured(sides: Sequence[Measurement]) -> tuple[str, ...]:
    """Cost gates of which no side holds a single fact (score files have none): they may be waived.

    What one side alone lacks is not among them: that gate stays open."""
    return tuple(
        gate
        for gate, names in COSTS.items()
        if not any(_measured(getattr(side, name)) for side in sides for name in names)
    )


def cost_checks(
    baseline: Measurement, candidate: Measurement, gates: GatesConfig,
    labels: Sequence[str] | None = None, routed: bool = False,
) -> list[Check]:  # fmt: skip
    """Every cost gate that is not waived. What is missing is open, never passed.

    Args:
        labels: cluster of each of the baseline's examples.
        routed: the candidate routes between experts.
    """
    gate_of: dict[Kind, Callable[[], list[Check]]] = {
        "budget": lambda: _budget(baseline, candidate, gates),
        "latency": lambda: _latency(baseline, candidate, gates),
        "memory": lambda: _memory(baseline, candidate, gates),
        "kv_hit": lambda: kv_hit_checks(baseline, candidate, gates, labels),
        "router": lambda: _router(candidate, routed),
        "index_swap": lambda: _index_swap(baseline, candidate, gates, labels, routed),
    }
    checks: list[Check] = []
    for kind, compute in gate_of.items():
        if kind in gates.waived:
            continue
        try:
            checks += compute()
        except DataError as error:
            checks.append(Check(kind, None, f"cannot be computed: {error}"))
    return checks


def _budget(baseline: Measurement, candidate: Measurement, gates: GatesConfig) -> list[Check]:
    sizes = {
        "parameters": (candidate.adapter_parameters, baseline.adapter_parameters),
        "flops": (candidate.adapter_flops_per_token, baseline.adapter_flops_per_token),
    }
    return [_parity(what, new, old, gates) for what, (new, old) in sizes.items()]


def _parity(what: str, new: float | None, old: float | None, gates: GatesConfig) -> Check:
    if not _positive(old) or new is None or not isfinite(new):
        reason = f"cannot be computed: candidate {new}, baseline {old}."
        return Check("budget", None, reason, what)
    assert old is not None
    change, tolerance = float(new) / float(old) - 1, gates.budget_tolerance
    numbers = f"{new:g} against {old:g} ({change:+.1%}, allowed +-{tolerance:.0%})"
    if change > tolerance + 1e-12:
        verdict, passed = "too expensive", False
    elif change >= -tolerance - 1e-12:
        verdict, passed = "at parity", True
    elif gates.allow_cheaper:
        verdict, passed = "below parity, allowed because cheaper", True
    else:
        verdict, passed = "below parity", False
    return Check("budget", passed, f"{verdict}: {numbers}.", what, value=change, limit=tolerance)


def _latency(baseline: Measurement, candidate: Measurement, gates: GatesConfig) -> list[Check]:
    if not baseline.latency_ms:
        return [Check("latency", None, f"cannot be computed: {baseline.name} has no latency.")]
    return [_phase(phase, baseline, candidate, gates) for phase in baseline.latency_ms]


def _phase(phase: str, baseline: Measurement, candidate: Measurement, gates: GatesConfig) -> Check:
    most = gates.latency_ratio_max
    if phase not in candidate.latency_ms:
        reason = f"cannot be computed: {candidate.name} has none."
        return Check("latency", None, reason, phase=phase)
    try:
        r = paired_ratio(candidate.latency_ms[phase], baseline.latency_ms[phase], gates.alpha)
    except DataError as error:
        return Check("latency", None, f"cannot be computed: {error}", phase=phase)
    passed = r.within(most)
    advice = "" if passed is not None else " More rounds would decide."
    reason = (
        f"p50 ratio {r.ratio:.3f}, one-sided {1 - r.alpha:.0%} limits {r.lower:.3f} and "
        f"{r.upper:.3f} over {r.rounds} paired rounds; the upper one may be {most:g}.{advice}"
    )
    return Check(
        "latency", passed, reason, phase=phase, value=r.ratio, limit=most,
        ci_low=r.lower, ci_high=r.upper,
    )  # fmt: skip


def _memory(baseline: Measurement, candidate: Measurement, gates: GatesConfig) -> list[Check]:
    new, old = candidate.adapter_memory_bytes, baseline.adapter_memory_bytes
    most = gates.memory_ratio_max
    if not _positive(old) or not _positive(new):
        reason = (
            f"cannot be computed: the adapters add {new} (candidate) and {old} (baseline) bytes."
        )
        return [Check("memory", None, reason)]
    ratio = float(new) / float(old)  # pyright: ignore[reportArgumentType]
    reason = (
        f"the adapter adds {new:g} bytes, {ratio:.3f} of the baseline's {old:g}; allowed {most:g}."
    )
    return [Check("memory", ratio <= most, reason, value=ratio, limit=most)]


def _router(candidate: Measurement, routed: bool) -> list[Check]:
    plans = None if candidate.router is None else candidate.router.plan_lengths
    if plans is None:
        reason = f"cannot be computed: {candidate.name} has no router.plan_lengths."
        return [Check("router", None, reason, "plan")] if routed else []
    longest = float(finite("router.plan_lengths", list(plans)).max())
    reason = f"longest plan {longest:g} actions, allowed {MAX_PLAN}."
    passed = longest <= MAX_PLAN
    return [Check("router", passed, reason, "plan", value=longest, limit=MAX_PLAN)]


def _index_swap(
    baseline: Measurement, candidate: Measurement, gates: GatesConfig,
    labels: Sequence[str] | None, routed: bool,
) -> list[Check]:  # fmt: skip
    """Each step by its lower limit, and the trend; scores that ignore the index pass no trend."""
    facts = candidate.router
    if facts is None or facts.index_swap is None:
        reason = f"cannot be computed: {candidate.name} has no router.index_swap."
        return [Check("index_swap", None, reason)] if routed else []
    clusters = facts.clusters or _clusters_of(baseline, candidate, facts.index_swap, labels)
    swap = index_swap(facts.index_swap, clusters, gates)
    checks = [
        Check("index_swap", s.passed, s.reason, phase=f"{s.better}>={s.worse}", value=s.difference,
              limit=0.0, ci_low=s.ci_low, ci_high=s.ci_high)
        for s in swap.steps
    ]  # fmt: skip
    if swap.p_value is None:
        reason = "cannot be computed: needs all conditions on the same examples."
        return [*checks, Check("index_swap", None, reason, phase="trend")]
    reason = f"mean rank correlation {swap.spearman:.3f}, Page's one-sided p {swap.p_value:.2g}."
    passed = True if swap.follows else None
    trend = Check("index_swap", passed, reason, phase="trend", value=swap.spearman,
                  p_value=swap.p_value)  # fmt: skip
    return [*checks, trend]


def _clusters_of(
    baseline: Measurement, candidate: Measurement, scores: Mapping[str, ArrayLike],
    labels: Sequence[str] | None,
) -> list[str] | None:  # fmt: skip
    """Clusters of the index-swap scores, if they are of the measured examples."""
    if labels is None or any(np.shape(v)[-1:] != (candidate.n,) for v in scores.values()):
        return None
    label = dict(zip(baseline.example_ids, labels, strict=True))
    return [label.get(example, example) for example in candidate.example_ids]


def _measured(fact: Any) -> bool:
    """Is there anything? Of timings by phase: in any phase."""
    if isinstance(fact, dict):
        return any(_measured(part) for part in fact.values())
    return fact is not None and np.size(fact) > 0


def _positive(value: float | None) -> bool:
    return value is not None and isfinite(value) and value > 0
