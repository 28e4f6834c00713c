"""What no drift detector can do, and what a known rhythm is worth: on streams that no constant was chosen on.

    python benchmarks/drift_limits.py

The limit: Page's CUSUM on the innovations of an AR(1), told the coefficient, the mean, the noise and the fall: for its
false alarms no chart has a shorter worst delay (Moustakides 1986). Its threshold is set so that 6 % of the stationary
streams of 100,000 scores alarm (Siegmund 1985), its delays are simulated from its steady state.
Writes benchmarks/results/drift_limits.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from drift import LONG, SHIFT, SHORT, WITHIN, shown  # noqa: E402
from scipy import stats  # noqa: E402
from streams import PERIOD, SD, STREAMS  # noqa: E402

from bem.online import DriftDetector  # noqa: E402
from bem.online.reference import chart_limit  # noqa: E402

FRESH = 79
"""Every generator here begins with it: `drift.py` has none of these streams. (77 was used to choose `SEASONED`: at 3 one
of ten stationary streams alarmed.)"""
RHO, ALLOWED = 0.5, 0.06
Delays = np.ndarray
"""Scores from the change to the alarm; NaN: alarmed before it; inf: never."""


def best_delays(streams: int = 4000, most: int = 3000, before: int = 400) -> Delays:
    """Of the chart that knows everything, on falls of half a standard deviation of an AR(1)."""
    moved = SHIFT * (1 - RHO) / math.sqrt(1 - RHO**2)  # of an innovation, in its sd
    limit = chart_limit(moved / 2, -LONG / math.log(1 - ALLOWED))
    rng = np.random.default_rng([FRESH, 0])
    level, found = np.zeros(streams), np.full(streams, np.inf)
    for t in range(before + most):
        mean = 0.0 if t < before else moved
        if t == before:  # the fall itself is one innovation, and whole
            mean = SHIFT / math.sqrt(1 - RHO**2)
        level = np.maximum(0.0, level + rng.normal(mean, 1.0, streams) - moved / 2)
        over = (level > limit) & np.isinf(found)
        found[over] = t + 1 - before if t >= before else np.nan
    return found


def delays(kind: str, period: float | None, streams: int, shift: float) -> Delays:
    """Of the detector with its defaults."""
    found = []
    for seed in range(streams):
        rng = np.random.default_rng([FRESH, 1, seed])
        x = STREAMS[kind](SHORT, rng)
        change = int(rng.integers(2000, 4000))
        x[change:] += shift * SD[kind]
        detector = DriftDetector(period=period)
        detector.update_many(x)
        event = math.inf if detector.alarm is None else detector.alarm.event
        found.append(event - change if event > change else math.nan)
    return np.array(found)


def false_alarms(kind: str, period: float | None, streams: int) -> int:
    """Stationary streams with any alarm."""
    count = 0
    for seed in range(streams):
        detector = DriftDetector(period=period)
        detector.update_many(STREAMS[kind](LONG, np.random.default_rng([FRESH, 2, seed])))
        count += detector.alarm is not None
    return count


def cells(found: Delays) -> str:
    """Share within 300 with a 95 % interval, median, 95 % quantile."""
    there = found[~np.isnan(found)]
    hits = int((there <= WITHIN).sum())
    low, high = stats.binomtest(hits, len(there)).proportion_ci(method="wilson")
    middle, late = np.quantile(there, [0.5, 0.95], method="higher")
    return f"{hits / len(there):.0%} [{low:.0%}, {high:.0%}] | {shown(middle)} | {shown(late)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--falls", type=int, default=300, help="streams with a fall, of each kind")
    parser.add_argument("--long", type=int, default=100, help="stationary streams of 100,000")
    options = parser.parse_args()
    falls, long = options.falls, options.long
    head = [
        "# What drift detectors can do",
        "",
        f"`python benchmarks/drift_limits.py --falls {falls} --long {long}`. Falls of half a standard deviation; Wilson intervals; delays in scores.",
        "No stream here is one of `drift.py`.",
        "",
        "| stream | detector | fall found within 300 | median | 95 % | stationary: alarmed | a rise alarms |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    best = best_delays()
    rows = [f"| AR(1) .5 | the best, told everything (mean delay {best[np.isfinite(best)].mean():.0f}) | {cells(best)} | {ALLOWED:.0%} | |"]  # fmt: skip
    plans = [("ar1", None, 0, 0), ("gaussian", None, 0, 0), ("daily", None, 0, 0), ("daily", PERIOD, long, falls)]  # fmt: skip
    for kind, period, calm, up in plans:
        alarms = f"{false_alarms(kind, period, calm)} of {calm}" if calm else ""
        risen = delays(kind, period, up, SHIFT) if up else np.array([])
        alarmed = f"{int(np.isfinite(risen).sum())} of {up}" if up else ""
        name = "ours" if period is None else f"ours, period={period}"
        rows.append(f"| {kind} | {name} | {cells(delays(kind, period, falls, -SHIFT))} | {alarms} | {alarmed} |")  # fmt: skip
        print(rows[-1], flush=True)
    text = "\n".join([*head, *rows]) + "\n"
    (ROOT / "benchmarks" / "results" / "drift_limits.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
