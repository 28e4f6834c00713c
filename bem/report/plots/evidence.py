"""The figures about evidence: is its margin worth believing, does quality fall with it, does
reranking pay?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bem.errors import DataError
from bem.report.plots.canvas import (
    INK,
    LINE,
    MUTED,
    PAPER,
    arm_colour,
    axes_of,
    blank_figure,
    plain,
    svg,
)
from bem.stats.inputs import finite
from bem.stats.monotone import CONDITIONS, OFF
from bem.stats.shares import wilson


@dataclass(frozen=True)
class Interval:
    """A number and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """Examples whose margin lies in [left, right); the last bin holds its right edge too."""

    left: float
    right: float
    n: int
    correct: Interval | None
    """Share of correct answers with its Wilson interval; None: no examples."""


@dataclass(frozen=True)
class Correctness:
    """How right one arm is on each example."""

    label: str
    correct: ArrayLike
    """[examples] in [0, 1]; between 0 and 1 where seeds disagree."""
    colour: int
    control: bool = False


@dataclass(frozen=True)
class Stairs:
    """Mean score of one arm under each condition: clean, corrupt, shuffled, off."""

    label: str
    scores: Mapping[str, Interval]
    colour: int
    control: bool = False


@dataclass(frozen=True)
class RerankerGain:
    """Mean reciprocal rank on one set of questions, before and after reranking."""

    label: str
    n: int
    """Questions."""
    first_stage: Interval
    reranked: Interval
    gain: Interval
    """Paired difference."""


def bins_of(
    margins: ArrayLike, correct: ArrayLike, n_bins: int = 8, alpha: float = 0.05
) -> list[Bin]:
    """Share of correct answers by margin, in bins of equal width over [0, 1].

    Raises:
        DataError: NaN, values outside [0, 1], or a different number of margins and answers.
    """
    x, y = finite("margins", margins), finite("correct", correct)
    if x.size != y.size:
        raise DataError(f"{x.size} margins cannot be paired with {y.size} answers.")
    if min(x.min(), y.min()) < 0 or max(x.max(), y.max()) > 1:
        raise DataError("margins and correct must lie in [0, 1].")
    edges = np.linspace(0, 1, n_bins + 1)
    place = np.minimum(np.searchsorted(edges, x, side="right") - 1, n_bins - 1)
    bins = []
    for i in range(n_bins):
        inside = y[place == i]
        share = _share(inside, alpha) if inside.size else None
        bins.append(Bin(float(edges[i]), float(edges[i + 1]), inside.size, share))
    return bins


def _share(right: NDArray[np.float64], alpha: float) -> Interval:
    low, high = wilson(float(right.sum()), right.size, alpha)
    return Interval(float(right.mean()), low, high)


def reliability(
    margins: ArrayLike, arms: Sequence[Correctness], n_bins: int = 8, alpha: float = 0.05
) -> str:
    """Share of correct answers against the evidence's margin, above the number of examples.

    Args:
        margins: best score minus median, [examples]; the same for all arms.
        arms: correctness on these examples.
        n_bins: bins of equal width.
        alpha: of the Wilson intervals.
    """
    figure = blank_figure(7.6, 4.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    bins: list[Bin] = []
    for place, arm in enumerate(arms):
        bins = bins_of(margins, arm.correct, n_bins, alpha)
        shift = _dodge(place, len(arms), 0.35 / n_bins)
        marks = [((b.left + b.right) / 2 + shift, b.correct) for b in bins if b.correct]
        _line(top, marks, arm)
    plain(top)
    top.set(ylabel="share correct", ylim=(-0.03, 1.03), xlim=(0, 1))
    top.tick_params(axis="x", length=0)
    top.grid(color=LINE, lw=0.6)
    _legend(top)
    _counts(bottom, bins)
    return svg(figure, "reliability", "Share of correct answers by the margin of the evidence")


def staircase(arms: Sequence[Stairs], metric: str = "score") -> str:
    """Mean score of each arm with a clean, a corrupt and a shuffled index, and without passages."""
    shown = [c for c in (*CONDITIONS, OFF) if any(c in arm.scores for arm in arms)]
    place = {c: i + (0.35 if c == OFF else 0.0) for i, c in enumerate(shown)}
    figure, axes = axes_of(7.6, 3.8)
    for i, arm in enumerate(arms):
        shift = _dodge(i, len(arms), 0.3)
        steps = [(place[c] + shift, arm.scores[c]) for c in CONDITIONS if c in arm.scores]
        _line(axes, steps, arm)
        if OFF in arm.scores:
            _line(axes, [(place[OFF] + shift, arm.scores[OFF])], arm, named=False)
    if OFF in place and len(shown) > 1:
        axes.axvline(place[OFF] - 0.68, color=LINE, lw=1)
    names = {**{c: f"{c} index" for c in CONDITIONS}, OFF: "no passages"}
    axes.set_xticks([place[c] for c in shown], [names[c] for c in shown])
    axes.tick_params(axis="x", length=0)
    axes.set(ylabel=metric, xlim=(-0.5, max(place.values(), default=0) + 0.5))
    axes.margins(y=0.12)
    axes.grid(axis="y", color=LINE, lw=0.6)
    _legend(axes)
    return svg(figure, "staircase", f"{metric} with an index that gets worse")


def reranker_gain(gains: Sequence[RerankerGain], name: str = "reranker") -> str:
    """Mean reciprocal rank of the first stage (hollow) and after reranking (filled), per set."""
    figure, axes = axes_of(7.6, 0.95 + 0.5 * len(gains))
    for y, gain in enumerate(gains):
        for mark, lift, colour, filled in (
            (gain.first_stage, -0.13, MUTED, PAPER),
            (gain.reranked, 0.13, arm_colour(1), arm_colour(1)),
        ):
            axes.plot([mark.low, mark.high], [y + lift] * 2, color=colour, lw=2)
            axes.plot(mark.value, y + lift, "o", ms=6.5, mfc=filled, mec=colour, mew=1.6)
        _signed(axes, y, gain.gain)
    axes.set_yticks(range(len(gains)), [f"{g.label}\n{g.n} questions" for g in gains])
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(gains) - 0.4, -0.6), xlabel="mean reciprocal rank of the right passage")
    axes.grid(axis="x", color=LINE, lw=0.6)
    for x, text, colour in ((0.0, "○ first stage", MUTED), (0.2, f"● {name}", arm_colour(1))):
        axes.text(
            x, 1.0, text, transform=axes.transAxes, color=colour, fontsize=8.5, va="bottom"
        )  # fmt: skip
    return svg(figure, "reranker_gain", "Mean reciprocal rank before and after reranking")


def _line(
    axes: Any,
    marks: Sequence[tuple[float, Interval]],
    arm: Correctness | Stairs,
    named: bool = True,
) -> None:
    """Values with their intervals, joined by a line; a control is dashed and has diamonds."""
    tint = arm_colour(arm.colour)
    for x, mark in marks:
        axes.plot([x, x], [mark.low, mark.high], color=tint, lw=1.2, solid_capstyle="butt")
    axes.plot(
        [x for x, _ in marks], [mark.value for _, mark in marks],
        color=tint, lw=1.6, ls=(0, (3, 2)) if arm.control else "-",
        marker="D" if arm.control else "o", ms=5.5 if arm.control else 6.5, mec=PAPER, mew=1,
        label=arm.label if named else None,
    )  # fmt: skip


def _legend(axes: Any) -> None:
    """Names above the picture: beside marks that stand this close they would hide one another."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=6, frameon=False, fontsize=9,
        labelcolor="linecolor", handlelength=1.8, columnspacing=1.6, borderpad=0.2,
    )  # fmt: skip


def _counts(axes: Any, bins: Sequence[Bin]) -> None:
    """How many examples each bin rests on."""
    plain(axes)
    middles = [(b.left + b.right) / 2 for b in bins]
    axes.bar(middles, [b.n for b in bins], [0.9 * (b.right - b.left) for b in bins], color=LINE)
    for x, b in zip(middles, bins, strict=True):
        axes.text(x, b.n, str(b.n), ha="center", va="bottom", color=MUTED, fontsize=8)
    axes.set(xlabel="margin of the evidence (best score − median)", ylabel="examples")
    axes.set_yticks([])
    axes.margins(y=0.3)


def _signed(axes: Any, y: float, gain: Interval) -> None:
    text = f"{gain.value:+.3f}  [{gain.low:+.3f}, {gain.high:+.3f}]".replace("-", "\u2212")
    clear = gain.low > 0 or gain.high < 0
    axes.text(
        1.012, y, text, transform=axes.get_yaxis_transform(), va="center",
        color=INK if clear else MUTED, fontsize=8,
    )  # fmt: skip


def _dodge(place: int, count: int, width: float) -> float:
    """Offset that keeps the marks of several arms apart."""
    return (place - (count - 1) / 2) * width / max(count - 1, 1)
