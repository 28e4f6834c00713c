"""The gates on what a candidate costs: budget, latency, memory, cache hits; a router's rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite

import numpy as np
from numpy.typing import ArrayLike

from bem.config import GatesConfig
from bem.errors import DataError
from bem.stats.bootstrap import joint_bca
from bem.stats.inputs import Floats, finite
from bem.stats.latency import paired_ratio
from bem.stats.measurement import Measurement
from bem.stats.monotone import index_swap
from bem.stats.verdict import Check
from bem.stats.weights import Statistic

MAX_PLAN = 3
"""Most actions in a router's plan."""


def cost_checks(baseline: Measurement, candidate: Measurement, gates: GatesConfig) -> list[Check]:
    """Every cost gate that is not waived. What is missing is open, never passed."""
    kinds: dict[str, Callable[[Measurement, Measurement, GatesConfig], list[Check]]] = {
        "budget": _budget,
        "latency": _latency,
        "memory": _memory,
        "kv_hit": _kv_hit,
        "router": _router,
    }
    checks: list[Check] = []
    for kind, compute in kinds.items():
        if kind in gates.waived:
            continue
        try:
            checks += compute(baseline, candidate, gates)
        except DataError as error:
            checks.append(Check(kind, None, f"cannot be computed: {error}"))
    return checks


def _budget(baseline: Measurement, candidate: Measurement, gates: GatesConfig) -> list[Check]:
    named = {
        "parameters": (candidate.adapter_parameters, baseline.adapter_parameters),
        "flops": (candidate.adapter_flops_per_token, baseline.adapter_flops_per_token),
    }
    return [_parity(f"budget.{key}", new, old, gates) for key, (new, old) in named.items()]


def _parity(name: str, new: float | None, old: float | None, gates: GatesConfig) -> Check:
    if not _positive(old) or new is None or not isfinite(new):
        return Check(name, None, f"cannot be computed: candidate {new}, baseline {old}.")
    assert old is not None
    change, tolerance = float(new) / float(old) - 1, gates.budget_tolerance
    numbers = f"{new:g} against {old:g} ({change:+.1%}, allowed +-{tolerance:.0%})"
    if change > tolerance + 1e-12:
        return Check(name, False, f"too expensive: {numbers}.", change, tolerance)
    if change >= -tolerance - 1e-12:
        return Check(name, True, f"at parity: {numbers}.", change, tolerance)
    if gates.allow_cheaper:
        return Check(
            name, True, f"below parity, allowed because cheaper: {numbers}.", change, tolerance
        )
    return Check(name, False, f"below parity: {numbers}.", change, tolerance)


def _latency(baseline: Measurement, candidate: Measurement, gates: GatesConfig) -> list[Check]:
    if not baseline.latency_ms:
        return [Check("latency", None, f"cannot be computed: {baseline.name} has no latency.")]
    return [_phase(phase, baseline, candidate, gates) for phase in baseline.latency_ms]


def _phase(phase: str, baseline: Measurement, candidate: Measurement, gates: GatesConfig) -> Check:
    name, most = f"latency.{phase}", gates.latency_ratio_max
    if phase not in candidate.latency_ms:
        return Check(name, None, f"cannot be computed: {candidate.name} has none.")
    try:
        r = paired_ratio(candidate.latency_ms[phase], baseline.latency_ms[phase], gates.alpha)
    except DataError as error:
        return Check(name, None, f"cannot be computed: {error}")
    passed = True if r.upper <= most else False if r.lower > most else None
    advice = "" if passed is not None else " More rounds would decide."
    reason = (
        f"p50 ratio {r.ratio:.3f}, one-sided {1 - r.alpha:.0%} limits {r.lower:.3f} and "
        f"{r.upper:.3f} over {r.rounds} paired rounds; the upper one may be {most:g}.{advice}"
    )
    return Check(name, passed, reason, r.ratio, most, r.lower, r.upper)


def _memory(baseline: Measurement, candidate: Measurement, gates: GatesConfig) -> list[Check]:
    new, old, most = candidate.memory_bytes, baseline.memory_bytes, gates.memory_ratio_max
    if not _positive(old) or not _positive(new):
        reason = f"cannot be computed: candidate {new}, baseline {old} bytes."
        return [Check("memory", None, reason)]
    assert new is not None and old is not None
    change = float(new) / float(old)
    reason = f"peak ratio {change:.3f}, allowed {most:g} ({new:g} against {old:g} bytes)."
    return [Check("memory", change <= most, reason, change, most)]


def _kv_hit(baseline: Measurement, candidate: Measurement, gates: GatesConfig) -> list[Check]:
    columns = _cache_columns(baseline, candidate)
    margin = -gates.kv_hit_margin_points / 100
    if len(columns) < gates.min_items:
        reason = f"only {len(columns)} requests; at least {gates.min_items} are needed."
        return [Check("kv_hit", None, reason)]
    statistic = Statistic("kv_hit", columns, _hit_rate_difference)
    bca = joint_bca([statistic], gates.n_bootstrap, gates.alpha, gates.seed)[0]
    passed = True if bca.lower >= margin else False if bca.upper < margin else None
    reason = (
        f"hit rate {100 * bca.observed:+.2f} points [{100 * bca.lower:.2f}, "
        f"{100 * bca.upper:.2f}] over {bca.n} paired requests; "
        f"the lower limit may be {100 * margin:g}."
    )
    return [Check("kv_hit", passed, reason, bca.observed, margin, bca.lower, bca.upper)]


def _cache_columns(baseline: Measurement, candidate: Measurement) -> Floats:
    """[requests, 4]: hits and needs of the candidate, hits and needs of the baseline."""
    rows = []
    for side in (candidate, baseline):
        if side.kv_hits is None or side.kv_needed is None:
            raise DataError(f"{side.name} has no kv_hits and kv_needed.")
        hits = finite(f"{side.name}: kv_hits", side.kv_hits)
        needed = finite(f"{side.name}: kv_needed", side.kv_needed)
        if hits.size != needed.size or (hits > needed).any() or hits.min() < 0 or not needed.any():
            raise DataError(f"{side.name}: kv_hits must lie between 0 and kv_needed, per request.")
        rows += [hits, needed]
    if rows[0].size != rows[2].size:
        raise DataError(f"{rows[0].size} requests cannot be paired with {rows[2].size}.")
    return np.stack(rows, axis=1)


def _hit_rate_difference(sums: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]


def _router(baseline: Measurement, candidate: Measurement, gates: GatesConfig) -> list[Check]:
    facts, checks = candidate.router, []
    if facts is None:
        return []
    if facts.plan_lengths is not None:
        longest = float(finite("router.plan_lengths", list(facts.plan_lengths)).max())
        reason = f"longest plan {longest:g} actions, allowed {MAX_PLAN}."
        checks.append(Check("router.plan", longest <= MAX_PLAN, reason, longest, MAX_PLAN))
    if facts.index_swap is not None:
        clusters = facts.clusters or _clusters(baseline, candidate, facts.index_swap)
        checks += [
            Check(f"router.{s.better}>={s.worse}", s.passed, s.reason, s.difference, 0.0,
                  s.ci_low, s.ci_high)
            for s in index_swap(facts.index_swap, clusters, gates).steps
        ]  # fmt: skip
    return checks


def _clusters(
    baseline: Measurement, candidate: Measurement, scores: Mapping[str, ArrayLike]
) -> list[str] | None:
    """Clusters of the index-swap scores, if they are of the measured examples."""
    if baseline.clusters is None or any(
        np.shape(v)[-1:] != (candidate.n,) for v in scores.values()
    ):
        return None
    of = dict(zip(baseline.example_ids, baseline.clusters, strict=True))
    return [of.get(example, example) for example in candidate.example_ids]


def _positive(value: float | None) -> bool:
    return value is not None and isfinite(value) and value > 0
