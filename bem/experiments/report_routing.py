"""The report's part on routing: who chooses between the experts, how well, and at what price.

What the router itself did and how it learned stands in `report_router`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bem.config import ArmConfig, ExperimentConfig, GatesConfig
from bem.errors import DataError
from bem.experiments import plots_routing as plots
from bem.experiments import report_router, wording
from bem.experiments.scoring import QUALITY
from bem.experiments.store import RunFolder
from bem.experiments.wording import Difference
from bem.stats.bootstrap import joint_bca
from bem.stats.inputs import Floats, cluster_codes, finite, sum_by_cluster
from bem.stats.latency import paired_ratio
from bem.stats.measurement import Measurement
from bem.stats.weights import Statistic, ratio

STICKY = "sticky"
"""Slice of the conversations whose last turn shows no cue."""
ROUTES = {
    "ar1": "router improved by policy gradient",
    "ar0": "router cloned from the oracle",
    "oracle": "least loss, in hindsight",
    "gold": "the maker's label",
    "linear": "linear classifier",
    "single": "the one best expert",
    "random": "any expert",
    "wrong": "any expert but the right one",
    "xlora": "PEFT's X-LoRA",
    "arrow": "PEFT's Arrow",
}
"""Who chooses, by `ArmConfig.route`."""


@dataclass(frozen=True)
class Row:
    """One arm beside the others."""

    arm: str
    colour: int
    about: str
    qualities: list[tuple[str, str]]
    """On the whole, and on the slice `sticky`: points, and the difference to the baseline."""
    costs: list[str]


@dataclass(frozen=True)
class Shaded:
    """Quality of one arm on one slice, in points."""

    text: str
    better: bool
    shade: float
    """In [0, 1]: how far it lies from the baseline."""


@dataclass(frozen=True)
class SliceRow:
    """One slice, arm by arm."""

    name: str
    n: int
    cells: list[Shaded]


@dataclass(frozen=True)
class RoutingPart:
    """Everything that the templates show of routing."""

    sentences: list[str]
    ranking: str
    qualities: list[str]
    costs: list[str]
    """Names of the columns."""
    rows: list[Row]
    slices: list[SliceRow]
    router: report_router.RouterPart


def part_of(
    folder: RunFolder,
    config: ExperimentConfig,
    measured: Mapping[str, Measurement],
    colours: Mapping[str, int],
) -> RoutingPart | None:
    """None if no arm of the run has a route."""
    if not any(arm.route for arm in config.arms):
        return None
    base, gates = measured[config.baseline.name], config.gates
    arms = sorted(config.arms, key=lambda arm: colours[arm.name])
    parts = [None, STICKY] if STICKY in base.slices else [None]
    gains = {
        part: {arm.name: gain(measured[arm.name], base, gates, part) for arm in arms}
        for part in parts
    }
    return RoutingPart(
        sentences=list(_sentences(config, measured)),
        ranking=_ranking(arms, gains, colours),
        qualities=[part or QUALITY for part in parts],
        costs=["answer loss", *(f"{p} p50" for p in base.latency_ms), "KV hits", "parameters"],
        rows=[_row(measured[arm.name], arm, base, gains, colours) for arm in arms],
        slices=list(_slices([measured[arm.name] for arm in arms], base)),
        router=report_router.part_of(folder, config, colours),
    )


# ------------------------------------------------------------------------------------- differences


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
    found = joint_bca([statistic], gates.n_bootstrap, gates.alpha, gates.seed)[0]
    return Difference(100 * found.observed, 100 * found.lower, 100 * found.upper)


def _share(sums: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _differences(arm: Measurement, other: Measurement) -> Floats:
    """Quality of the arm minus the other's, averaged over seeds: [examples] in the other's order."""
    place = arm.aligned_to(other.example_ids)
    new = finite(f"{arm.name}: {QUALITY}", arm.metrics[QUALITY], 2)[:, place].mean(0)
    return new - finite(f"{other.name}: {QUALITY}", other.metrics[QUALITY], 2).mean(0)


# ------------------------------------------------------------------------------------ side by side

Gains = Mapping[str | None, Mapping[str, Difference | None]]
"""Slice (None: the whole) -> arm -> difference to the baseline."""


def _ranking(arms: Sequence[ArmConfig], gains: Gains, colours: Mapping[str, int]) -> str:
    """The baseline is the line at 0; the arm with the largest gain stands first."""
    rows = [arm for arm in arms if arm.role != "baseline" and gains[None][arm.name]]
    rows.sort(key=lambda arm: -_value(gains[None][arm.name]))
    baseline = next(arm.name for arm in arms if arm.role == "baseline")
    shown = [
        plots.Standing(
            arm.name,
            {part or "all conversations": gains[part][arm.name] for part in gains},
            colours[arm.name],
            arm.role == "control",
        )
        for arm in rows
    ]
    return plots.ranking(shown, baseline) if shown else ""


def _value(difference: Difference | None) -> float:
    return difference.value if difference else float("-inf")


def _row(
    m: Measurement, arm: ArmConfig, base: Measurement, gains: Gains, colours: Mapping[str, int]
) -> Row:
    differences = [gains[part][m.name] for part in gains]
    means = [_number(100 * _mean(m, QUALITY, part), 1) for part in gains]
    return Row(
        m.name,
        colours[m.name],
        ROUTES[arm.route] if arm.route else "no experts",
        [
            (mean, "baseline" if m is base else str(d or "–"))
            for mean, d in zip(means, differences, strict=True)
        ],
        list(_costs(m, base)),
    )


def _costs(m: Measurement, base: Measurement) -> Iterator[str]:
    yield _number(_mean(m, "loss"), 3)
    for phase, times in base.latency_ms.items():
        if m is base:
            yield f"{np.median(np.asarray(times)):.1f} ms"
        else:
            yield f"×{paired_ratio(m.latency_ms[phase], times).ratio:.2f}"
    if m.kv_hits is None or m.kv_needed is None:
        yield "–"
    else:
        yield f"{np.sum(m.kv_hits) / np.sum(m.kv_needed):.1%}"
    yield "–" if m.adapter_parameters is None else f"{m.adapter_parameters:,.0f}"


def _mean(m: Measurement, metric: str, part: str | None = None) -> float:
    """NaN where the arm has no such metric."""
    if metric not in m.metrics:
        return float("nan")
    scores = np.asarray(m.metrics[metric])
    return float((scores if part is None else scores[:, np.asarray(m.slices[part])]).mean())


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "–"


def _slices(arms: Sequence[Measurement], base: Measurement) -> Iterator[SliceRow]:
    """Quality by task and by what a task is asked for; 30 points from the baseline shade fully."""
    for part, mask in base.slices.items():
        values = [100 * _mean(m, QUALITY, part) for m in arms]
        usual = values[arms.index(base)]
        yield SliceRow(
            part,
            int(np.sum(mask)),
            [
                Shaded(_number(v, 1), v > usual, min(1.0, abs(v - usual) / 30) if v == v else 0.0)
                for v in values
            ],
        )


# ---------------------------------------------------------------------------------- plain sentences


def _sentences(config: ExperimentConfig, measured: Mapping[str, Measurement]) -> Iterator[str]:
    """What the numbers say of the router (AR1, else AR0), and no more than their intervals show."""
    by_route = {arm.route: measured[arm.name] for arm in reversed(config.arms) if arm.route}
    main = by_route.get("ar1") or by_route.get("ar0")
    if main is None:
        return
    base, gates = measured[config.baseline.name], config.gates
    yield from _against(main, base, gates, paces=(main, base))
    if "ar1" in by_route:
        yield from _against(main, by_route.get("ar0"), gates)
    yield from _gap(main, base, by_route.get("oracle"), gates)
    if STICKY in base.slices:
        yield from _against(main, by_route.get("linear"), gates, STICKY)
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
    found = gain(main, other, gates, part) if other else None
    if other is None or found is None:
        return
    place = " where the last turn shows no cue" if part == STICKY else ""
    said = wording.compared(main.name, other.name, found, place)
    yield said + (f"; {_paces(*paces, gates)}." if paces else ".")


def _paces(arm: Measurement, other: Measurement, gates: GatesConfig) -> str:
    """`ar1 takes ×1.02 (...) of the time of s0 in prefill, ×1.05 (...) in decode`."""
    found = []
    for phase in other.latency_ms:
        r = paired_ratio(arm.latency_ms[phase], other.latency_ms[phase], gates.alpha)
        whose = "" if found else f" of the time of {other.name}"
        found.append(f"{wording.times(r.ratio, r.lower, r.upper)}{whose} in {phase}")
    return f"{arm.name} takes {', '.join(found)}"


def _gap(
    main: Measurement, base: Measurement, oracle: Measurement | None, gates: GatesConfig
) -> Iterator[str]:
    whole = gain(oracle, base, gates) if oracle else None
    if oracle is None or whole is None or gain(main, base, gates) is None:
        return
    if whole.low <= 0:
        said = wording.compared(oracle.name, base.name, whole)
        yield f"{said}: there is no certain gap that a router could close."
        return
    share = closed(main, base, oracle, gates)
    yield (
        f"{main.name} closes {_percent(share)} of the gap from {base.name} to {oracle.name}, "
        f"which is {whole.value:.1f} points wide."
    )


def _percent(share: Difference) -> str:
    return wording.minus(f"{share.value:.0f} % [{share.low:.0f}, {share.high:.0f}]")
