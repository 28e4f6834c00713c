"""What may be claimed of a router: paired differences with their intervals, and plain sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from bem.config import ExperimentConfig, GatesConfig
from bem.errors import DataError
from bem.report import words
from bem.report.words import Difference
from bem.stats.bootstrap import joint_bca
from bem.stats.inputs import Floats, cluster_codes, finite, sum_by_cluster
from bem.stats.latency import paired_ratio
from bem.stats.measurement import Measurement
from bem.stats.weights import Statistic, ratio
from bem.tasks.scoring import QUALITY

STICKY = "sticky"
"""Slice of the conversations whose last turn shows no cue."""


def gain(
    arm: Measurement, other: Measurement, gates: GatesConfig, part: str | None = None
) -> Difference | None:
    """Paired difference in quality on the whole or one slice, with the interval that `judge` states.

    None where it cannot be computed: other examples, an empty slice, NaN.
    """
    try:
        mask = np.ones(other.n) if part is None else np.asarray(other.slices[part], dtype=float)
        return _bca([_differences(arm, other) * mask, mask], ratio, other.clusters, gates)
    except DataError:
        return None


def closed(
    arm: Measurement, base: Measurement, oracle: Measurement, gates: GatesConfig
) -> Difference:
    """Share of the way from the baseline to the oracle that an arm has gone, in percent.

    mean(arm - base) / mean(oracle - base), BCa over clusters: examples that both gain on count in
    numerator and denominator of the same resample.
    """
    columns = [_differences(arm, base), _differences(oracle, base)]
    return _bca(columns, _share, base.clusters, gates)


def _bca(
    columns: Sequence[Floats],
    of: Callable[[Floats], Floats],
    clusters: Sequence[str] | None,
    gates: GatesConfig,
) -> Difference:
    """Interval of a function of sums over examples, times 100."""
    table = np.stack(columns, axis=1)
    table = sum_by_cluster(table, cluster_codes(clusters, len(table)))
    statistic = Statistic("quality", table, of)
    bca = joint_bca([statistic], gates.n_bootstrap, gates.alpha, gates.seed)[0]
    return Difference(100 * bca.observed, 100 * bca.lower, 100 * bca.upper)


def _share(sums: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _differences(arm: Measurement, other: Measurement) -> Floats:
    """Quality of the arm minus the other's, averaged over seeds: [examples] in the other's order."""
    place = arm.aligned_to(other.example_ids)
    new = finite(f"{arm.name}: {QUALITY}", arm.metrics[QUALITY], 2)[:, place].mean(0)
    return new - finite(f"{other.name}: {QUALITY}", other.metrics[QUALITY], 2).mean(0)


# ---------------------------------------------------------------------------------- plain sentences


def sentences(config: ExperimentConfig, measured: Mapping[str, Measurement]) -> Iterator[str]:
    """What the numbers say of the routers, and no more than their intervals show."""
    by_route = {arm.route: measured[arm.name] for arm in reversed(config.arms) if arm.route}
    base, gates = measured[config.baseline.name], config.gates
    improved, cloned = by_route.get("ar1"), by_route.get("ar0")
    for main in [arm for arm in (improved or cloned, by_route.get("fitted")) if arm]:
        yield from _against(main, base, gates, paces=(main, base))
        if main is improved:
            yield from _against(main, cloned, gates)
        yield from _gap(main, base, by_route.get("oracle"), gates)
        if STICKY in base.slices:
            yield from _against(main, by_route.get("linear"), gates, STICKY)
            yield from _against(main, by_route.get("encoder"), gates, STICKY)
        if peer := by_route.get("xlora"):
            yield from _against(main, peer, gates, paces=(peer, main))


def _against(
    main: Measurement,
    other: Measurement | None,
    gates: GatesConfig,
    part: str | None = None,
    paces: tuple[Measurement, Measurement] | None = None,
) -> Iterator[str]:
    """One comparison; `paces`: whose time in whose is told with it."""
    difference = gain(main, other, gates, part) if other else None
    if other is None or other is main or difference is None:
        return
    place = " where the last turn shows no cue" if part == STICKY else ""
    claim = words.compared(main.name, other.name, difference, place)
    pace = _paces(*paces, gates) if paces else ""
    yield f"{claim}; {pace}." if pace else f"{claim}."


def _paces(arm: Measurement, other: Measurement, gates: GatesConfig) -> str:
    """`ar1 takes ×1.02 (...) of the time of s0 in prefill, ×1.05 (...) in decode`; "" if one of
    them was not timed."""
    ratios = []
    for phase in [phase for phase in other.latency_ms if phase in arm.latency_ms]:
        r = paired_ratio(arm.latency_ms[phase], other.latency_ms[phase], gates.alpha)
        whose = "" if ratios else f" of the time of {other.name}"
        ratios.append(f"{words.times(r.ratio, r.lower, r.upper)}{whose} in {phase}")
    return f"{arm.name} takes {', '.join(ratios)}" if ratios else ""


def _gap(
    main: Measurement, base: Measurement, oracle: Measurement | None, gates: GatesConfig
) -> Iterator[str]:
    whole = gain(oracle, base, gates) if oracle else None
    if oracle is None or whole is None or gain(main, base, gates) is None:
        return
    if whole.low <= 0:
        claim = words.compared(oracle.name, base.name, whole)
        yield f"{claim}: there is no certain gap that a router could close."
        return
    share = closed(main, base, oracle, gates)
    yield (
        f"{main.name} closes {_percent(share)} of the gap from {base.name} to {oracle.name}, "
        f"which is {whole.value:.1f} points wide."
    )


def _percent(share: Difference) -> str:
    return words.minus(f"{share.value:.0f} % [{share.low:.0f}, {share.high:.0f}]")
