"""The page of `online.py`: Markdown from finished arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from online_streams import STREAMS
from scipy import stats

Run = Mapping[str, Any]
"""{"stream", "seed", "arms": arm -> {"scores", "old", "cpu_s", "moves"?}}"""
HEAD = (
    "Score per event in points, prequential: every answer is given before its correction is learned from. "
    "Differences to the frozen version: mean over seeds with a 95 % t-interval, paired by seed. Seeds below 10, and 100 "
    "and 101, of clinc were used to choose the settings (online_settings.md)."
)


def page(runs: Sequence[Run], sizes: Mapping[str, int], about: str) -> str:
    """The whole page."""
    lines = ["# Online learning on streams that change", "", about, HEAD]
    for name in dict.fromkeys(run["stream"] for run in runs):
        lines += ["", *_section(name, [run for run in runs if run["stream"] == name], sizes)]
    return "\n".join(lines) + "\n"


def _section(name: str, runs: Sequence[Run], sizes: Mapping[str, int]) -> list[str]:
    spec, known = STREAMS[name], sizes["known"]
    events = len(runs[0]["arms"]["frozen"]["scores"])
    cpu = sum(cell["cpu_s"] for run in runs for cell in run["arms"].values())
    arms = [
        arm for arm in ("frozen", "unprotected", "protected", "oracle") if arm in runs[0]["arms"]
    ]
    lines = [
        f"## {name}: {spec.about}",
        "",
        f"{len(runs)} seeds, {events} events, the first {known} of what is known; score `{spec.metric}`; forgetting on "
        f"{sizes['old']} rows of what is known; {sizes['trusted']} others are the protected learner's trusted ones, half "
        f"practised on, half held out; {cpu:.0f} CPU seconds.",
        "",
        "| arm | on what is new | minus frozen | last quarter, minus frozen | on the old at the end | minus frozen |",
        "|---|---:|---:|---:|---:|---:|",
        *(_row(arm, runs, known) for arm in arms),
    ]
    if "calm protected" not in runs[0]["arms"]:
        return lines
    calm = interval([_mean(r, "calm protected", 0) - _mean(r, "calm frozen", 0) for r in runs])
    lines += [
        "",
        f"Nothing changes ({sizes['stationary']} events of what is known): protected minus frozen {calm}.",
        "",
        f"Moves of the protected arm over all seeds: {_moves(runs, 'protected')}; where nothing changes: "
        f"{_moves(runs, 'calm protected')}.",
    ]
    return lines


def _row(arm: str, runs: Sequence[Run], known: int) -> str:
    quarter = (len(runs[0]["arms"]["frozen"]["scores"]) - known) // 4
    new = [_mean(run, arm, known) for run in runs]
    old = [run["arms"][arm]["old"] for run in runs]
    cells = ["", "", ""]
    if arm != "frozen":
        pairs = [
            [n - _mean(run, "frozen", known) for n, run in zip(new, runs, strict=True)],
            [_mean(run, arm, -quarter) - _mean(run, "frozen", -quarter) for run in runs],
            [o - run["arms"]["frozen"]["old"] for o, run in zip(old, runs, strict=True)],
        ]
        cells = [interval(values) for values in pairs]
    means = [f"{100 * float(np.mean(values)):.1f}" for values in (new, old)]
    return f"| {arm} | {means[0]} | {cells[0]} | {cells[1]} | {means[1]} | {cells[2]} |"


def _mean(run: Run, arm: str, since: int) -> float:
    return float(np.mean(run["arms"][arm]["scores"][since:]))


def _moves(runs: Sequence[Run], arm: str) -> str:
    counts = [run["arms"][arm]["moves"] for run in runs]
    return ", ".join(f"{sum(c[word] for c in counts)} {word}" for word in counts[0])


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % t-interval over seeds, in points."""
    mean = 100 * float(np.mean(values))
    if len(values) < 2:
        return f"{mean:+.1f} (one seed)"
    half = 100 * float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"
