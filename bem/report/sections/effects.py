"""Differences to the baseline, quality against latency, and every gain beside its control."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite

from bem.config import ExperimentConfig
from bem.report import words
from bem.report.checks import subject_of
from bem.report.plots import figures
from bem.runs.verdicts import Judgement
from bem.stats.verdict import Effect, Verdict


@dataclass(frozen=True)
class Contrast:
    """A candidate beside one of its controls."""

    candidate: str
    control: str
    metric: str
    gain: str
    control_gain: str
    difference: str
    reading: str


def effects_of(judgement: Judgement, colours: Mapping[str, int]) -> list[figures.ForestRow]:
    """The primary family on all examples, candidates before controls."""
    return [
        _row(name, effect, colours[name], name in judgement.controls)
        for metric in judgement.family
        for name, verdict in _judged(judgement).items()
        if (effect := _whole(verdict, metric)) is not None
    ]


def _row(name: str, e: Effect, colour: int, control: bool) -> figures.ForestRow:
    points = e.points_per_unit or 1.0
    low, high = e.ci_low * points, e.ci_high * points
    return figures.ForestRow(
        group=e.metric + ("" if e.points_per_unit else " (own units)"),
        label=name,
        value=e.gain * points,
        low=low,
        high=high,
        colour=colour,
        clear=low > 0 or high < 0,
        control=control,
    )


def scatter(config: ExperimentConfig, judgement: Judgement, colours: Mapping[str, int]) -> str:
    """One panel per phase: quality in the first primary metric against the latency ratio."""
    if not judgement.family:
        return ""
    metric, panels = judgement.family[0], {}
    for name, verdict in _judged(judgement).items():
        effect = _whole(verdict, metric)
        for check in verdict.checks:
            subject = subject_of(check, verdict)
            if subject.kind != "latency" or check.value is None or effect is None:
                continue
            points = effect.points_per_unit or 1.0
            point = figures.Point(
                label=name,
                latency=check.value,
                latency_low=check.ci_low or check.value,
                latency_high=check.ci_high or check.value,
                quality=effect.gain * points,
                quality_low=effect.ci_low * points,
                quality_high=effect.ci_high * points,
                colour=colours[name],
                control=name in judgement.controls,
            )
            panels.setdefault(subject.phase, []).append(point)
    if not panels:
        return ""
    return figures.quality_latency(panels, config.gates.latency_ratio_max, metric)


def contrasts_of(judgement: Judgement) -> Iterator[Contrast]:
    """Every primary metric of every candidate beside its controls, where either shows something."""
    for name, row in judgement.contrasts.items():
        for control, contrast in row.items():
            for metric in judgement.family:
                gain = _whole(judgement.candidates[name], metric)
                control_gain = _whole(judgement.controls[control], metric)
                difference = _whole(contrast, metric)
                if gain is None or control_gain is None or difference is None:
                    continue
                yield Contrast(
                    candidate=name,
                    control=control,
                    metric=metric,
                    gain=_with_interval(gain),
                    control_gain=_with_interval(control_gain),
                    difference=_with_interval(difference),
                    reading=_reading(difference, control),
                )


def _judged(judgement: Judgement) -> dict[str, Verdict]:
    return {**judgement.candidates, **judgement.controls}


def _whole(verdict: Verdict, metric: str) -> Effect | None:
    """The effect on all examples; None: not measured, or its limits are not finite."""
    about = (e for e in verdict.effects if (e.metric, e.slice) == (metric, None))
    return next((e for e in about if isfinite(e.ci_low) and isfinite(e.ci_high)), None)


def _with_interval(e: Effect) -> str:
    return f"{words.signed(e, e.gain)} {words.interval(e)}"


def _reading(difference: Effect, control: str) -> str:
    if difference.ci_low > 0:
        return f"more than {control}"
    if difference.ci_high < 0:
        return f"less than {control}"
    return f"no detectable difference from {control}"
