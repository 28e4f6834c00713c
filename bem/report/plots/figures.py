"""The figures of every report: effects, quality against latency, training curves.

Each function takes plain records and returns one `<svg>` element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bem.report.plots.canvas import (
    INK,
    LINE,
    MUTED,
    PAPER,
    REJECT,
    arm_colour,
    arrows,
    axes_of,
    blank_figure,
    labels_beside,
    plain,
    svg,
)


@dataclass(frozen=True)
class ForestRow:
    """One row of the forest plot: a difference to the baseline, in points."""

    group: str
    """Metric under which the row stands."""
    label: str
    """The arm."""
    value: float
    low: float
    high: float
    colour: int
    """Index of the arm's colour."""
    clear: bool = False
    """The interval lies on one side of zero: drawn filled."""
    control: bool = False
    """Drawn as a diamond instead of a disc."""


@dataclass(frozen=True)
class Point:
    """One arm in the picture of quality against latency."""

    label: str
    latency: float
    """Ratio of p50 latency to the baseline."""
    latency_low: float
    latency_high: float
    quality: float
    """Points above the baseline."""
    quality_low: float
    quality_high: float
    colour: int
    control: bool = False


@dataclass(frozen=True)
class Curve:
    """Training loss of one arm and seed."""

    label: str
    steps: Sequence[float]
    loss: Sequence[float]
    colour: int
    control: bool = False


def forest(effects: Sequence[ForestRow], unit: str = "points") -> str:
    """Effects with their intervals, grouped by metric; the vertical line is no difference."""
    groups = list(dict.fromkeys(e.group for e in effects))
    height = 0.9 + 0.235 * len(effects) + 0.34 * len(groups)
    figure, axes = axes_of(7.6, height)
    y, ticks, names = 0.0, [], []
    low, high = _limits(effects)
    for group in groups:
        axes.text(
            -0.005, y, group, transform=axes.get_yaxis_transform(), ha="right", va="center",
            color=INK, fontweight="bold", fontsize=9.5,
        )  # fmt: skip
        y += 1.05
        for effect in (e for e in effects if e.group == group):
            _effect(axes, effect, y, low, high)
            ticks.append(y)
            names.append(effect.label)
            y += 1
        axes.axhline(y - 0.35, color=LINE, lw=0.6)
        y += 0.4
    axes.axvline(0, color=MUTED, lw=1)
    axes.set(xlim=(low, high), ylim=(y - 0.3, -0.7), xlabel=f"difference to the baseline ({unit})")
    axes.set_yticks(ticks, names)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=LINE, lw=0.6)
    arrows(axes, "worse", "better")
    return svg(figure, "forest", "Differences to the baseline with their intervals")


def quality_latency(panels: Mapping[str, Sequence[Point]], limit: float, metric: str) -> str:
    """Quality above the baseline against the latency ratio, with intervals; a panel per phase.

    Args:
        panels: phase (prefill, decode ...) -> arms.
        limit: largest allowed upper limit of the ratio; what lies right of it is shaded.
        metric: what quality is.
    """
    figure = blank_figure(7.6, 3.7)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (phase, points) in zip(row, panels.items(), strict=True):
        plain(axes)
        xs = [1.0, limit, *(p.latency_low for p in points), *(p.latency_high for p in points)]
        pad = 0.08 * (max(xs) - min(xs))
        right = max(xs) + (3 if max(xs) > limit else 1.5) * pad
        axes.set(xlim=(min(xs) - pad, right), xlabel=f"p50 {phase} latency ÷ baseline's")
        axes.axvspan(limit, right, color=REJECT, alpha=0.08, lw=0)
        axes.axvline(limit, color=REJECT, lw=1, ls=(0, (4, 3)))
        axes.axhline(0, color=MUTED, lw=1)
        axes.axvline(1, color=MUTED, lw=1)
        for p in points:
            colour = arm_colour(p.colour)
            axes.plot([p.latency_low, p.latency_high], [p.quality] * 2, color=colour, lw=1.4)
            axes.plot([p.latency] * 2, [p.quality_low, p.quality_high], color=colour, lw=1.4)
            marker = "D" if p.control else "o"
            axes.plot(p.latency, p.quality, marker, ms=7, color=colour, mec=PAPER, mew=1)
        axes.margins(y=0.15)
        axes.grid(color=LINE, lw=0.6)
        axes.text(
            limit, 1.01, f"limit {limit:g}", transform=axes.get_xaxis_transform(), color=REJECT,
            fontsize=8, ha="center", va="bottom",
        )  # fmt: skip
    row[0].set_ylabel(f"{metric} above the baseline (points)")
    for axes, points in zip(row, panels.values(), strict=True):
        labels_beside(axes, [(p.latency, p.quality, p.label, arm_colour(p.colour)) for p in points])
    return svg(figure, "quality_latency", "Quality against latency")


def training_curves(curves: Sequence[Curve]) -> str:
    """Training loss of every arm: each seed a thin line, their mean a thick one; log scale."""
    figure, axes = axes_of(7.6, 3.6)
    ends = []
    for label in dict.fromkeys(c.label for c in curves):
        seeds = [c for c in curves if c.label == label]
        colour, dashes = arm_colour(seeds[0].colour), (0, (3, 2)) if seeds[0].control else "-"
        for curve in seeds:
            axes.plot(curve.steps, smooth(curve.loss), color=colour, lw=0.7, alpha=0.45)
        length = min(len(c.loss) for c in seeds)
        mean = [sum(c.loss[i] for c in seeds) / len(seeds) for i in range(length)]
        line = smooth(mean)
        axes.plot(seeds[0].steps[:length], line, color=colour, lw=1.8, ls=dashes)
        ends.append((seeds[0].steps[length - 1], line[-1], label, colour))
    axes.set_yscale("log")
    _plain_log_ticks(axes)
    axes.set(xlabel="optimiser step", ylabel="training loss (smoothed)")
    axes.margins(x=0.02)
    axes.grid(color=LINE, lw=0.6)
    labels_beside(axes, ends)
    return svg(figure, "training", "Training loss of every arm")


def smooth(values: Sequence[float], share: float = 0.04) -> list[float]:
    """Centred moving average over `share` of the values on either side."""
    half = int(len(values) * share)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def _effect(axes: Any, effect: ForestRow, y: float, low: float, high: float) -> None:
    colour = arm_colour(effect.colour)
    left, right = max(effect.low, low), min(effect.high, high)
    axes.plot([left, right], [y, y], color=colour, lw=2, solid_capstyle="butt")
    for end, edge, marker in ((effect.low, low, "<"), (effect.high, high, ">")):
        if (end < low) if marker == "<" else (end > high):  # the interval leaves the picture
            axes.plot(edge, y, marker, color=colour, ms=5, clip_on=False)
    if low <= effect.value <= high:
        axes.plot(
            effect.value, y, "D" if effect.control else "o", ms=5.5 if effect.control else 6.5,
            mfc=colour if effect.clear else PAPER, mec=colour, mew=1.6,
        )  # fmt: skip
    numbers = f"{effect.value:+.1f}  [{effect.low:+.1f}, {effect.high:+.1f}]"
    axes.text(
        1.012, y, numbers.replace("-", "\u2212"),
        transform=axes.get_yaxis_transform(), va="center", color=MUTED, fontsize=8,
    )  # fmt: skip


def _limits(effects: Sequence[ForestRow]) -> tuple[float, float]:
    """Range of the x axis: all point estimates, and intervals as far as the typical one reaches."""
    values = [0.0, *(e.value for e in effects)]
    widths = sorted(e.high - e.low for e in effects) or [1.0]
    reach = max(1.0, 1.5 * widths[(3 * len(widths)) // 4])
    low = max(min([0.0, *(e.low for e in effects)]), min(values) - reach)
    high = min(max([0.0, *(e.high for e in effects)]), max(values) + reach)
    pad = 0.05 * (high - low) or 1.0
    return low - pad, high + pad


def _plain_log_ticks(axes: Any) -> None:
    """Losses span less than a decade: plain numbers instead of powers of ten."""
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low > 4 else (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)
