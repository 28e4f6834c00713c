"""The report's part on routing: who chooses between the experts, how well, and at what price.

What may be claimed of it stands in `claims`, what the router itself did in `router`, and how it learned in
`learning`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bem.config import ArmConfig, ExperimentConfig
from bem.report import words
from bem.report.claims import STICKY, gain, sentences
from bem.report.plots import routing as plots
from bem.report.sections import learning, router
from bem.report.words import Difference
from bem.runs.folder import RunFolder
from bem.stats.latency import paired_ratio
from bem.stats.measurement import Measurement
from bem.tasks.scoring import QUALITY

ROUTES = {
    "ar1": "router improved by policy gradient",
    "ar0": "router cloned from the oracle",
    "fitted": "router fitted to the makers' labels",
    "oracle": "least loss, in hindsight",
    "gold": "the maker's label",
    "linear": "linear classifier",
    "encoder": "sentence encoder, nearest centroid",
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
    router: router.RouterPart
    learning: learning.LearningPart


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
    conduct = router.part_of(folder, config, colours)
    return RoutingPart(
        sentences=list(sentences(config, measured)),
        ranking=_ranking(arms, gains, colours),
        qualities=[part or QUALITY for part in parts],
        costs=["answer loss", *(f"{p} p50" for p in base.latency_ms), "KV hits", "parameters"],
        rows=[_row(measured[arm.name], arm, base, gains, colours) for arm in arms],
        slices=list(_slices([measured[arm.name] for arm in arms], base)),
        router=conduct,
        learning=learning.part_of(folder, config, conduct.options),
    )


# ------------------------------------------------------------------------------------ side by side

Gains = Mapping[str | None, Mapping[str, Difference | None]]
"""Slice (None: the whole) -> arm -> difference to the baseline."""


def _ranking(arms: Sequence[ArmConfig], gains: Gains, colours: Mapping[str, int]) -> str:
    """The baseline is the line at 0; the arm with the largest gain stands first."""
    rows = [arm for arm in arms if arm.role != "baseline" and gains[None][arm.name]]
    rows.sort(key=lambda arm: -_value(gains[None][arm.name]))
    baseline = next(arm.name for arm in arms if arm.role == "baseline")
    shown = [
        plots.RankedArm(
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
        _about(arm),
        [
            (mean, "baseline" if m is base else str(d or "–"))
            for mean, d in zip(means, differences, strict=True)
        ],
        list(_costs(m, base)),
    )


def _about(arm: ArmConfig) -> str:
    if arm.shots is not None:
        return f"no adapter, {words.shots(arm.shots)}"
    return ROUTES[arm.route] if arm.route else "no experts"


def _costs(m: Measurement, base: Measurement) -> Iterator[str]:
    yield _number(_mean(m, "loss"), 3)
    for phase, times in base.latency_ms.items():
        if m is base:
            yield f"{np.median(np.asarray(times)):.1f} ms"
        elif phase not in m.latency_ms:
            yield "–"
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
