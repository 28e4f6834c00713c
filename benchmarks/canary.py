"""How often does a canary roll back what is not worse, promote what is, and how soon?

    python benchmarks/canary.py            # about a minute on one core
    python benchmarks/canary.py --quick    # fewer runs, printed, not written

Scores are beta(3.5, 1.5) (mean .7, sd .187), each example a little easier or harder for both versions; the candidate differs by
`shift` standard deviations of the paired difference. Looked at every 10 events, 80 times. Beside the betting e-processes: a
t-test at every look, as people do it. Writes benchmarks/results/canary.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from scipy.special import stdtr  # noqa: E402
from scipy.stats import binomtest  # noqa: E402

from bem.files import write_text  # noqa: E402
from bem.online.betting import answered_wealth, paired_wealth  # noqa: E402

ALPHA, LOOK, LOOKS = 0.05, 10, 80
MARGIN = 0.1  # of the paired difference's sd: what may be lost
SHIFTS = (0.0, 0.1, 0.3, -0.1, -0.2, -0.3, -0.5)
TRAFFIC, SHARE = 4000, 0.5
BATCH = 100


@dataclass
class Outcome:
    """Of all runs of one kind: event of each decision; inf: never."""

    promoted: np.ndarray
    rolled_back: np.ndarray


def scores(rng: np.random.Generator, runs: int, n: int, shift: float) -> tuple[np.ndarray, ...]:
    """Baseline and candidate (runs, n) in [0, 1]; a share of 60 % of the spread is the example's own."""
    old = rng.beta(3.5, 1.5, (runs, n))
    again = rng.beta(3.5, 1.5, (runs, n))
    same = rng.random((runs, n)) < 0.6
    new = np.where(same, old, again)
    return old, moved(new, shift * SD)


def moved(x: np.ndarray, by: float) -> np.ndarray:
    """Scores with a mean that is exactly `by` higher in expectation, still in [0, 1]: shrunk towards an end."""
    if by >= 0:
        return x + (1 - x) * by / (1 - 0.7)
    return x + x * by / 0.7


SD = (2 * 0.4 * (0.7 * 0.3 / 6)) ** 0.5
"""Of the paired difference without a shift: beta(3.5, 1.5) has variance .7 * .3 / 6."""


def first(crossed: np.ndarray, every: int) -> np.ndarray:
    """(runs, looks) -> event of the first look that crossed; inf: none."""
    return np.where(crossed.any(1), (crossed.argmax(1) + 1.0) * every, np.inf)


def paired(rng: np.random.Generator, runs: int, shift: float) -> dict[str, Outcome]:
    """The e-processes and the t-test, at the same looks."""
    old, new = scores(rng, runs, LOOK * LOOKS, shift)
    d = new - old
    at = slice(LOOK - 1, None, LOOK)
    up = np.maximum.accumulate(paired_wealth(d, -MARGIN * SD, 1.0, fallen=False), 1)[:, at]
    down = np.maximum.accumulate(paired_wealth(d, -MARGIN * SD, 1.0, fallen=True), 1)[:, at]
    n = np.arange(1, d.shape[1] + 1)[at]
    mean = d.cumsum(1)[:, at] / n
    se = np.sqrt(((d**2).cumsum(1)[:, at] / n - mean**2) / (n - 1))
    with np.errstate(divide="ignore", invalid="ignore"):  # all equal so far: NaN, no decision
        worse = stdtr(n - 1, mean / se) < ALPHA  # the usual test: is it worse at all?
        better = stdtr(n - 1, -(mean + MARGIN * SD) / se) < ALPHA
    return {
        "betting": decided(first(up >= 1 / ALPHA, LOOK), first(down >= 1 / ALPHA, LOOK)),
        "t-test at every look": decided(first(better, LOOK), first(worse, LOOK)),
    }


def traffic(rng: np.random.Generator, runs: int, shift: float) -> dict[str, Outcome]:
    """Half of the requests to each version."""
    old, new = scores(rng, runs, TRAFFIC, shift)
    arm = rng.random(old.shape) < SHARE
    x = np.where(arm, new, old)
    events = []
    for fallen in (False, True):
        wealth = answered_wealth(arm, x, -MARGIN * SD, 1.0, SHARE, fallen)
        events.append(first(wealth >= 1 / ALPHA, 1))
    return {"betting": decided(*events)}


def decided(up: np.ndarray, down: np.ndarray) -> Outcome:
    """The first decision stands; in a tie the rollback."""
    return Outcome(np.where(up < down, up, np.inf), np.where(down <= up, down, np.inf))


def table(measure, runs: int) -> list[str]:
    lines = ["| true shift | judged by | rolled back | promoted | open | median events to rollback | to promotion |",
             "|---:|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for shift in SHIFTS:
        parts: dict[str, list[Outcome]] = {}
        for batch in range(runs // BATCH):
            rng = np.random.default_rng([int(shift * 100) + 1000, batch])
            for name, outcome in measure(rng, BATCH, shift).items():
                parts.setdefault(name, []).append(outcome)
        for name, outcomes in parts.items():
            up = np.concatenate([o.promoted for o in outcomes])
            down = np.concatenate([o.rolled_back for o in outcomes])
            open_ = np.isinf(up) & np.isinf(down)
            lines.append(
                f"| {shift:+.1f} sd | {name} | {share(np.isfinite(down))} | {share(np.isfinite(up))} "
                f"| {open_.mean():.1%} | {median(down)} | {median(up)} |"
            )
    return lines


def share(hits: np.ndarray) -> str:
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return f"{hits.mean():.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def median(events: np.ndarray) -> str:
    found = events[np.isfinite(events)]
    return f"{np.median(found):.0f}" if len(found) > len(events) / 20 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    runs = 200 if quick else 2000
    text = "\n".join([
        "# The canary, by simulation\n",
        f"`python benchmarks/canary.py`: {runs} runs of each row, alpha {ALPHA}, 95 % intervals (Wilson). A candidate is promoted",
        f"when a loss of {MARGIN} sd is ruled out and rolled back when a loss of more than {MARGIN} sd is shown; sd is that of the",
        f"paired difference ({SD:.3f}). At -{MARGIN} sd both hypotheses are true: each error is at most alpha.\n",
        f"## Replayed examples, paired: {LOOKS} looks, one in {LOOK} examples\n",
        *table(paired, runs),
        f"\n## Traffic, {SHARE:.0%} to the candidate: a look after each of {TRAFFIC} requests\n",
        *table(traffic, runs // 2 if quick else runs),
        "",
    ])  # fmt: skip
    print(text)
    if not quick:
        write_text(ROOT / "benchmarks" / "results" / "canary.md", text)


if __name__ == "__main__":
    main()
