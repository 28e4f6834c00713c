"""The figures about routing: every arm beside the others, how the router learned, what it used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from bem.report.plots.canvas import (
    INK,
    LINE,
    MUTED,
    N_ARM_COLOURS,
    PAPER,
    REJECT,
    arm_colour,
    arrows,
    blank_figure,
    labels_beside,
    plain,
    svg,
)
from bem.report.words import Difference

Rows = Mapping[int, Sequence[Mapping[str, Any]]]
"""Seed -> rows with the fields of `policy_gradient.Iteration`, or of `bc.Accuracy`."""


@dataclass(frozen=True)
class RankedArm:
    """One arm's difference to the baseline in each panel; None: it could not be computed."""

    label: str
    gains: Mapping[str, Difference | None]
    colour: int
    control: bool = False


def ranking(arms: Sequence[RankedArm], baseline: str) -> str:
    """Differences to the baseline with their intervals, one panel per part of the conversations."""
    panels = list(arms[0].gains)
    figure = blank_figure(7.6, 1.05 + 0.27 * len(arms))
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=True):
        plain(axes)
        axes.axvline(0, color=MUTED, lw=1)
        for y, arm in enumerate(arms):
            if gain := arm.gains[panel]:
                _ranked(axes, y, arm, gain)
        axes.set_title(panel, color=INK, fontsize=9.5, fontweight="bold", pad=14)
        axes.set(xlabel=f"quality above {baseline} (points)", ylim=(len(arms) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.06)
        axes.grid(axis="x", color=LINE, lw=0.6)
        arrows(axes, "worse", "better")
    row[0].set_yticks(range(len(arms)), [arm.label for arm in arms])
    return svg(figure, "ranking", "Quality of every arm against the baseline")


def _ranked(axes: Any, y: int, arm: RankedArm, gain: Difference) -> None:
    tint, clear = arm_colour(arm.colour), gain.low > 0 or gain.high < 0
    axes.plot([gain.low, gain.high], [y, y], color=tint, lw=2, solid_capstyle="butt")
    axes.plot(
        gain.value, y, "D" if arm.control else "o", ms=5.5 if arm.control else 6.5,
        mfc=tint if clear else PAPER, mec=tint, mew=1.6,
    )  # fmt: skip


def learning(seeds: Rows, delta: float) -> str:
    """Reward with two standard errors, KL below its limit, and entropy, by iteration.

    Args:
        seeds: rows with iteration, reward, reward_se, kl, accepted, entropy.
        delta: largest KL of a step; refused steps are crosses on the axis.
    """
    figure = blank_figure(7.6, 5.4)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
    ends = []
    for place, (seed, rows) in enumerate(seeds.items(), 1):
        tint, x = arm_colour(place), [row["iteration"] for row in rows]
        reward, se = (np.array([row[key] for row in rows]) for key in ("reward", "reward_se"))
        top.fill_between(x, reward - 2 * se, reward + 2 * se, color=tint, alpha=0.13, lw=0)
        for axes, values in (
            (top, reward), (middle, [r["kl"] for r in rows]), (bottom, [r["entropy"] for r in rows]),
        ):  # fmt: skip
            axes.plot(x, values, color=tint, lw=1.6, marker="o", ms=3)
        refused = [row["iteration"] for row in rows if not row["accepted"]]
        if refused:  # an empty line would have no place in the layout
            middle.plot(
                refused, [0] * len(refused), "x", color=REJECT, ms=6, mew=1.8, clip_on=False
            )
        ends.append((x[-1], reward[-1], f"seed {seed}", tint))
    for axes, label in ((top, "reward"), (middle, "KL of the step"), (bottom, "entropy (nats)")):
        plain(axes)
        axes.set_ylabel(label)
        axes.grid(color=LINE, lw=0.6)
        axes.margins(x=0.02)
    middle.axhline(delta, color=REJECT, lw=1, ls=(0, (4, 3)))
    middle.set_ylim(0, 1.25 * max(delta, *(row["kl"] for rows in seeds.values() for row in rows)))
    bottom.set_ylim(bottom=0)
    _whole_numbers(bottom)
    bottom.set_xlabel("iteration")
    middle.text(
        1.005, delta, f"limit {delta:g}", transform=middle.get_yaxis_transform(), color=REJECT,
        fontsize=8, va="center",
    )  # fmt: skip
    labels_beside(top, ends)
    return svg(figure, "learning", "Reward, KL and entropy of the policy gradient")


def expert_use(seeds: Rows, options: Sequence[str]) -> str:
    """Share of the chunks under each option by iteration, one panel per seed; "" below two iterations.

    Args:
        seeds: rows with iteration and expert_use, the shares of `options`; option 0 is the base.
        options: names. Only the most used have an area of their own.
    """
    shares = {seed: np.array([r["expert_use"] for r in rows]) for seed, rows in seeds.items()}
    if not shares or min(len(s) for s in shares.values()) < 2:
        return ""
    order = np.argsort(-np.mean([s.mean(0) for s in shares.values()], axis=0), kind="stable")
    own = sorted(order[: N_ARM_COLOURS - 1].tolist())
    names = [options[i] for i in own] + (["others"] if len(options) > len(own) else [])
    tints = [arm_colour(i) for i in range(len(own))] + [MUTED]
    figure = blank_figure(7.6, 3.0)
    row = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    for axes, (seed, share) in zip(row, shares.items(), strict=True):
        plain(axes)
        x = [r["iteration"] for r in seeds[seed]]
        parts = [share[:, i] for i in own] + [1 - share[:, own].sum(1)] * (len(names) > len(own))
        axes.stackplot(
            x, parts, colors=tints[: len(parts)], alpha=0.75, lw=0.5, edgecolor=PAPER, labels=names
        )
        axes.set(xlabel=f"iteration, seed {seed}", ylim=(0, 1), xlim=(x[0], x[-1]))
        _whole_numbers(axes)
    row[0].set_ylabel("share of the chunks")
    figure.legend(
        *row[0].get_legend_handles_labels(), loc="outside upper left", ncols=6, frameon=False,
        fontsize=8.5, labelcolor=INK, handlelength=1.0, columnspacing=1.2,
    )  # fmt: skip
    return svg(figure, "expert_use", "Use of the experts while the router learns")


def cloning(seeds: Rows) -> str:
    """Accuracy of every head on held-out traces (one disc per seed) above majority and chance.

    Args:
        seeds: rows with head, accuracy, majority and chance.
    """
    heads = list(dict.fromkeys(row["head"] for rows in seeds.values() for row in rows))
    figure = blank_figure(7.6, 0.95 + (0.2 + 0.16 * len(seeds)) * len(heads))
    axes = figure.add_subplot()
    plain(axes)
    for place, rows in enumerate(seeds.values(), 1):
        for row in rows:
            y = heads.index(row["head"]) + (place - (len(seeds) + 1) / 2) * 0.7 / len(seeds)
            axes.plot([row["majority"], row["accuracy"]], [y, y], color=arm_colour(place), lw=1.2)
            axes.plot(row["chance"], y, "|", color=MUTED, ms=8, mew=1.4)
            axes.plot(row["majority"], y, "D", ms=8, mfc=PAPER, mec=arm_colour(place), mew=1.2)
            axes.plot(row["accuracy"], y, "o", ms=5.5, color=arm_colour(place), mec=PAPER, mew=1)
    axes.set_yticks(range(len(heads)), heads)
    axes.set(
        xlabel="share of the oracle's choices", xlim=(-0.02, 1.02), ylim=(len(heads) - 0.4, -0.6)
    )
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=LINE, lw=0.6)
    return svg(figure, "cloning", "Accuracy of the cloned router's heads")


def _whole_numbers(axes: Any) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
