"""The score table: means over examples and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bem.config import ExperimentConfig
from bem.report.sections.arms import ordered
from bem.stats.measurement import Measurement
from bem.stats.scores import Metric
from bem.tasks.scoring import QUALITY


@dataclass(frozen=True)
class Score:
    """One row of the score table."""

    label: str
    whole: bool
    """Over all examples, not one slice."""
    values: list[str]
    best: int | None
    """Which arm is best; None: all equal."""


def scores_of(
    config: ExperimentConfig, measured: Mapping[str, Measurement], family: Sequence[str]
) -> Iterator[Score]:
    """Every metric on the whole, the first primary one on each slice."""
    sides = [measured[arm.name] for arm in ordered(config)]
    base = measured[config.baseline.name]
    for metric in base.metrics:
        if metric == QUALITY and metric not in family:
            continue  # the same numbers as the tasks' own metric
        slices = base.slices if metric in family[:1] else {}
        for part, mask in {"": np.ones(base.n, dtype=bool), **slices}.items():
            values = [mean(side, metric, np.asarray(mask)) for side in sides]
            yield _row(part or metric, not part, values, base.metric(metric))


def _row(label: str, whole: bool, values: Sequence[float], meaning: Metric) -> Score:
    finite, best = [v for v in values if np.isfinite(v)], None
    if finite and max(finite) > min(finite):
        best = values.index(max(finite) if meaning.higher_is_better else min(finite))
    scale, digits = meaning.points_per_unit or 1.0, 1 if meaning.points_per_unit else 3
    shown = [f"{v * scale:.{digits}f}" if np.isfinite(v) else "–" for v in values]
    return Score(label, whole, shown, best)


def mean(m: Measurement, metric: str, mask: np.ndarray) -> float:
    """NaN where the arm has no such metric, or no example of the slice has it."""
    if metric not in m.metrics or not mask.any():
        return float("nan")
    return float(np.asarray(m.metrics[metric])[:, mask].mean())
