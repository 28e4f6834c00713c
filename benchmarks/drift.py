"""How often does a drift detector cry wolf, how soon does it see a fall, and does a rise leave it cold?

    pip install --no-deps river frouros narwhals tqdm     # optional: their detectors stand beside ours
    python benchmarks/drift.py            # ten minutes on one core; stopped, it goes on where it was
    python benchmarks/drift.py --quick    # fewer streams, printed, not written

Stationary streams of 100,000 scores, and streams of 6,000 whose mean moves by half a standard deviation at a random
place (`streams.py`). Each detector begins with the stream; ours and the source's vote take its first 1,000 scores as reference. A
stream counts as an alarm at the first one. Writes benchmarks/results/drift.json (rows) and drift.md (tables).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402
from streams import PERIOD, SD, STREAMS  # noqa: E402

from bem.files import read_json, sha256_file, sha256_json, write_json, write_text  # noqa: E402
from bem.online import DriftDetector, DriftStatus  # noqa: E402

LONG, SHORT, SETTLED = 100_000, 6000, 1000
SHIFT, WITHIN, AIM_FALSE, AIM_FOUND = 0.5, 300, 0.06, 0.95
ACTS = {"streams", "drift", "charts", "reference"}
Alarm = Callable[[np.ndarray], int | None]
"""Event (from 1) of the first alarm after the first 1,000 scores."""


# --- detectors ----------------------------------------------------------------------------------


def ours(x: np.ndarray) -> int | None:
    detector = DriftDetector()
    detector.update_many(x)
    return None if detector.alarm is None else detector.alarm.event


def ours_day(x: np.ndarray) -> int | None:
    """With a reference of five days of the rhythm."""
    detector = DriftDetector(window_size=5 * PERIOD)
    detector.update_many(x)
    return None if detector.alarm is None else detector.alarm.event


def second_opinions(x: np.ndarray) -> int | None:
    """The first WARNING, or alarm, with bounds of [0, 1]."""
    statuses = DriftDetector(bounds=(0.0, 1.0)).update_many(x.clip(0, 1))
    for event, status in enumerate(statuses, 1):
        if status in (DriftStatus.WARNING, DriftStatus.DRIFT_DETECTED):
            return event
    return None


def source_vote(x: np.ndarray) -> int | None:
    """The source's detector with its reference filled in: half of the signals, two-sided, p < .01;
    Page-Hinkley with threshold 5 in units of the score. At every tenth score, for it is slow."""
    reference, total, lowest = x[:SETTLED], 0.0, 0.0
    for t in range(SETTLED, len(x)):
        total += reference.mean() - x[t] - 0.005
        lowest = min(lowest, total)
        if t % 10:
            continue
        recent = x[t - 99 : t + 1]
        if reference.std() == recent.std() == 0 and recent[0] == reference[0]:
            continue  # no test sees anything
        signals = [
            stats.ttest_ind(reference, recent, equal_var=False).pvalue < 0.01,
            stats.ks_2samp(reference, recent, method="asymp").pvalue < 0.01,
            total - lowest > 5,
        ]
        if sum(signals) >= len(signals) // 2:
            return t + 1
    return None


def stepwise(make: Callable[[], object], drifted: str) -> Alarm:
    """Somebody's detector, fed score by score; alarms within the first 1,000 reset nothing and do not count."""

    def first(x: np.ndarray) -> int | None:
        detector = make()
        for event, score in enumerate(x.tolist(), 1):
            found = detector.update(score)  # type: ignore[attr-defined]
            if isinstance(found, dict):
                raise TypeError("this detector is not one of streams")
            if event > SETTLED and getattr(detector, drifted):
                return event
        return None

    return first


def detectors(quick: bool) -> dict[str, tuple[Alarm, int, int]]:
    """Name -> (first alarm, stationary streams, streams with a change) of each kind."""
    most = (10, 40) if quick else (100, 300)
    some = (5, 20) if quick else (30, 100)
    few = (2, 10) if quick else (4, 20)
    found: dict[str, tuple[Alarm, int, int]] = {
        "**ours**: CUSUM of blocks": (ours, *most),
        "ours, second opinions (WARNING)": (second_opinions, *some),
        "source's vote, with a reference": (source_vote, *few),
    }
    if importlib.util.find_spec("river"):
        from river.drift import ADWIN, KSWIN, PageHinkley

        found |= {
            "river PageHinkley, down": (
                stepwise(lambda: PageHinkley(mode="down"), "drift_detected"), *few),
            "river ADWIN": (stepwise(ADWIN, "drift_detected"), *few),
            "river KSWIN": (stepwise(lambda: KSWIN(seed=0), "drift_detected"), few[0] // 2, few[1] // 2),
        }  # fmt: skip
    if importlib.util.find_spec("frouros"):
        from frouros.detectors.concept_drift import ADWIN as FrourosADWIN
        from frouros.detectors.concept_drift import CUSUM, HDDMA

        def errors(detector) -> Alarm:
            """frouros watches errors, which rise; it says what it found in `status`."""

            def first(x: np.ndarray) -> int | None:
                watch = detector()
                for event, score in enumerate((1 - x).tolist(), 1):
                    watch.update(value=score)
                    if event > SETTLED and watch.status["drift"]:
                        return event
                return None

            return first

        found |= {
            "frouros CUSUM": (errors(CUSUM), *few),
            "frouros HDDM_A": (errors(HDDMA), *few),
            "frouros ADWIN": (errors(FrourosADWIN), *few),
        }
    return found


# --- measuring ----------------------------------------------------------------------------------


def false_alarms(first: Alarm, kind: str, streams: int) -> np.ndarray:
    """(streams,) bool: did it alarm on 100,000 stationary scores?"""
    alarms = [
        first(STREAMS[kind](LONG, np.random.default_rng([1, seed]))) for seed in range(streams)
    ]
    return np.array([alarm is not None for alarm in alarms])


def delays(first: Alarm, kind: str, streams: int, shift: float, more: int = 0) -> np.ndarray:
    """(streams,) scores from the change to the alarm; NaN: alarmed before it; inf: never.

    `more` scores come before, for a detector with a long reference.
    """
    found = []
    for seed in range(streams):
        rng = np.random.default_rng([2, seed])
        x = STREAMS[kind](SHORT + more, rng)
        change = int(rng.integers(2000, 4000)) + more
        x[change:] += shift * SD[kind]
        event = first(x)
        found.append(np.inf if event is None else event - change if event > change else np.nan)
    return np.array(found, dtype=float)


def share(hits: np.ndarray) -> str:
    interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return f"{hits.mean():.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def measured(first: Alarm, kind: str, long: int, short: int) -> dict[str, object]:
    """One row, as JSON values."""
    more = 4 * PERIOD if first is ours_day else 0
    falls, rises = (delays(first, kind, short, shift, more) for shift in (-SHIFT, SHIFT))
    return {
        "alarms": int(false_alarms(first, kind, long).sum()),
        "long": long,
        "falls": [None if np.isnan(d) else d if np.isfinite(d) else -1 for d in falls.tolist()],
        "rises": [None if np.isnan(d) else d if np.isfinite(d) else -1 for d in rises.tolist()],
    }


def row(name: str, found: dict) -> str:
    """As Markdown."""
    cells = [name, f"{found['alarms'] / found['long']:.0%} of {found['long']}"]
    falls = np.array([d for d in found["falls"] if d is not None])
    falls = np.where(falls < 0, np.inf, falls)
    rises = np.array([d for d in found["rises"] if d is not None])
    if len(falls) < len(found["falls"]) / 2:
        cells += ["alarms before the change", "", "", ""]
    else:
        middle, late = np.quantile(falls, [0.5, 0.95], method="higher")
        cells += [share(falls <= WITHIN), shown(middle), shown(late)]
        cells.append(f"{(rises >= 0).mean():.0%}" if len(rises) else "")
    return "| " + " | ".join(cells) + " |"


def shown(delay: float) -> str:
    return f"{delay:.0f}" if np.isfinite(delay) else "never"


def plan(quick: bool) -> list[tuple[str, str, Alarm, int, int]]:
    """(kind, name, detector, stationary streams, streams with a change): ours first."""
    found = [
        (kind, name, first, *((1, 5) if kind == "constant" else counts))  # all are the same one
        for kind in STREAMS
        for name, (first, *counts) in detectors(quick).items()
    ]
    found.append(
        ("daily", "ours, window_size of five days", ours_day, *((5, 20) if quick else (100, 60)))
    )
    return sorted(found, key=lambda cell: "ours" not in cell[1])


def code_digest() -> str:
    """Other code, other numbers."""
    files = [ROOT / "benchmarks" / "streams.py", *sorted((ROOT / "bem" / "online").glob("*.py"))]
    return sha256_json([sha256_file(f) for f in files if f.stem in ACTS])


def run(quick: bool, target: Path | None) -> dict[str, dict]:
    """Rows by `kind | detector`, written to `target` as they come."""
    digest, rows = code_digest(), {}
    if target is not None and target.is_file() and (kept := read_json(target))["code"] == digest:
        rows = kept["rows"]
    for kind, name, first, long, short in plan(quick):
        key = f"{kind} | {name}"
        if key not in rows:
            rows[key] = measured(first, kind, long, short)
            print(kind, row(name, rows[key]), flush=True)
            if target is not None:
                write_json(target, {"code": digest, "rows": rows}, indent=None)
    return rows


HEAD = [
    f"| detector | stationary: alarmed | fall found within {WITHIN} | median delay | 95 % | a rise alarms |",
    "|---|---:|---:|---:|---:|---:|",
]


def report(rows: dict[str, dict]) -> str:
    lines = [
        "# Drift detectors side by side\n",
        f"`python benchmarks/drift.py`. Stationary: share of streams of {LONG:,} scores with any alarm. Fall: half a standard deviation",
        f"of a score, at a random place of {SHORT:,} scores (95 % intervals, Wilson); delays in scores. Promised with the defaults, for",
        f"every kind: {AIM_FALSE:.0%} of the stationary streams at most; and for independent scores {AIM_FOUND:.0%} of the falls within {WITHIN}.",
        "Settings of others are their defaults. Streams: `benchmarks/streams.py`.\n",
    ]  # fmt: skip
    for kind, make in STREAMS.items():
        lines += [f"## {kind}\n", " ".join((make.__doc__ or kind).split()) + "\n", *HEAD]
        for key, found in rows.items():
            if key.startswith(f"{kind} | "):
                lines.append(row(key.removeprefix(f"{kind} | "), found))
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    results = ROOT / "benchmarks" / "results"
    text = report(run(quick, None if quick else results / "drift.json"))
    print(text)
    if not quick:
        write_text(results / "drift.md", text)


if __name__ == "__main__":
    main()
