"""How often does `judge` promote, reject or leave open a candidate whose true gain is known?

    python benchmarks/power.py            # half an hour on one core; stopped, it goes on where it was
    python benchmarks/power.py --quick    # a minute: fewer runs, printed, not written

Two arms answer n questions whose difficulty is uniform (beta(1, 1)) and share 70 % of their answers;
the candidate's other answers are right more often, so that it is truly `gain` points better on
average, in every slice alike, or with one slice in which it truly loses 5 points. Costs are waived.
Writes benchmarks/results/power.json (counts) and power.md (tables).
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from scipy.stats import binomtest  # noqa: E402

from bem.config import GatesConfig  # noqa: E402
from bem.files import read_json, sha256_file, sha256_json, write_json, write_text  # noqa: E402
from bem.stats import Measurement, judge  # noqa: E402

COMMAND = "python benchmarks/power.py"
GATES = GatesConfig(n_bootstrap=2000, waived=("budget", "latency", "memory", "kv_hit"))
SHARED = 0.7
DECISIONS = ("PROMOTE", "REJECT", "INCONCLUSIVE")
METRICS = ("em", "f1", "chrf", "bleu")
DOCUMENT = 4  # questions on one document
PARAPHRASES = 0.5  # of the further questions on a document: their answers are those of the first
AIM_POWER, AIM_HARM = 0.85, 0.05
BATCH = 25
HARMED_RUNS, LOOK = 3000, 300
"""Most runs of a situation with a harmed slice; every LOOK runs it ends if its aim is decided."""


@dataclass(frozen=True)
class Cell:
    """One situation, to be judged `runs` times."""

    n: int
    slices: int
    gain: float
    """Points, true, on average over the set; with a harmed slice: in all others."""
    metrics: int = 1
    clustered: bool = False
    harmed: bool = False
    """The first slice truly loses 5 points."""
    rows: int = 0
    """Examples of the first slice; 0: all slices are alike. The others lie in no slice if there is
    but one."""

    @property
    def harmed_rows(self) -> int:
        return self.rows or self.n // max(self.slices, 1)


def cells(quick: bool) -> dict[Cell, int]:
    """Every situation with its number of runs."""
    sizes, gains = ((300, 1000), (0, 5)) if quick else ((300, 500, 1000, 2000), (0, 2, 3, 5))
    runs: dict[Cell, int] = {}
    for n in sizes:
        for k in (0, 10) if quick else (0, 5, 10, 20):
            runs |= {Cell(n, k, g): 600 if k in (0, 10) else 200 for g in gains}
    large = (1000,) if quick else (1000, 2000)
    for n in large:
        for k in (0, 10):
            runs |= {Cell(n, k, g, metrics=m): 150 for m in (2, 4) for g in gains}
            runs |= {Cell(n, k, g, clustered=True): 200 for g in gains}
    harmed = [(1000, 5), (2000, 5), (2000, 10), (4000, 20)]
    for n, k in harmed[:1] if quick else harmed:
        runs |= {Cell(n, k, g, harmed=True): HARMED_RUNS for g in gains if g > 0}
        runs |= {Cell(n, k, 4): 600, Cell(n, 0, 4): 600} if not quick else {}
    if not quick:
        runs |= {Cell(n, k, 4, harmed=True): HARMED_RUNS for n, k in harmed[2:]}
        runs |= {Cell(n, 1, g, harmed=True, rows=200): HARMED_RUNS for n in large for g in (3, 5)}
        runs |= {Cell(2000, 5, 5, harmed=True, clustered=True): HARMED_RUNS}
        runs |= {Cell(2000, 10, 5, harmed=True, metrics=4): HARMED_RUNS}
    runs = dict(sorted(runs.items(), key=lambda item: not item[0].harmed))  # the hardest first
    return dict.fromkeys(runs, 20) if quick else runs


# --- simulated answers ---------------------------------------------------------------------------


def arms(cell: Cell, rng: np.random.Generator) -> tuple[Measurement, Measurement]:
    """Baseline and candidate."""
    n = cell.n
    first = np.arange(n)
    if cell.clustered:
        copies = (first % DOCUMENT > 0) & (rng.random(n) < PARAPHRASES)
        first = np.where(copies, first - first % DOCUMENT, first)
    part = (np.arange(n) // DOCUMENT if cell.clustered else np.arange(n)) % max(cell.slices, 1)
    if cell.rows:
        part = (np.arange(n) >= cell.rows).astype(int)
    gain = np.where(cell.harmed & (part == 0), -5.0, cell.gain) / 100
    easy = rng.random(n)
    right = rng.random(n) < easy
    # p uniform, p' = clip(p + s) is |gain| / (1 - SHARED) higher on average for this s
    shift = np.sign(gain) * (1 - np.sqrt(1 - 2 * np.abs(gain) / (1 - SHARED)))
    again = rng.random(n) >= SHARED
    other = np.where(again, rng.random(n) < np.clip(easy + shift, 0, 1), right)
    old, new = (_metrics(rng, side, cell.metrics) for side in (right, other))
    new = {m: np.where(again, scores, old[m])[first] for m, scores in new.items()}
    old = {m: scores[first] for m, scores in old.items()}
    ids = [str(i) for i in range(n)]
    slices = {f"s{k}": part == k for k in range(cell.slices)}
    labels = [f"d{i // DOCUMENT}" for i in range(n)] if cell.clustered else None
    return (
        Measurement("baseline", old, ids, clusters=labels, slices=slices),
        Measurement("candidate", new, ids, clusters=labels),
    )


def _metrics(rng: np.random.Generator, right: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """em, and other scores of the same answers: partial credit, and two with noise of their own."""
    n = len(right)
    f1 = np.where(right, 1.0, rng.beta(2, 5, n) * (rng.random(n) < 0.5))
    chrf = np.clip(100 * (0.2 + 0.7 * f1) + rng.normal(0, 5, n), 0, 100)
    bleu = np.clip(100 * (0.1 + 0.6 * f1) + rng.normal(0, 10, n), 0, 100)
    scores = {"em": right.astype(float), "f1": f1, "chrf": chrf, "bleu": bleu}
    return {metric: scores[metric] for metric in METRICS[:count]}


def judged(cell: Cell, run: int) -> str:
    """The decision of one run; the same for the same cell and run."""
    key = int(sha256_json(asdict(cell))[:8], 16)
    baseline, candidate = arms(cell, np.random.default_rng([key, run]))
    return judge(baseline, {"candidate": candidate}, GATES)["candidate"].decision


# --- running and resuming ------------------------------------------------------------------------


def code_digest() -> str:
    """sha256 over the code that judges and that draws the answers: other code, other counts."""
    files = sorted((ROOT / "bem" / "stats").glob("*.py"))
    drawn = inspect.getsource(arms) + inspect.getsource(_metrics) + str((SHARED, PARAPHRASES))
    return sha256_json([GATES.model_dump(mode="json"), drawn, *map(sha256_file, files)])


def run(plan: dict[Cell, int], target: Path | None) -> dict[Cell, list[int]]:
    """Counts of PROMOTE, REJECT and INCONCLUSIVE of every cell, written to `target` as they grow."""
    counts = {cell: [0, 0, 0] for cell in plan}
    digest, started, made_before = code_digest(), time.perf_counter(), 0
    if target is not None and target.is_file():
        before = read_json(target)
        for row in before["cells"] if before["code"] == digest else []:
            cell = Cell(**{k: v for k, v in row.items() if k != "counts"})
            if cell in counts:
                counts[cell] = row["counts"]
                made_before += sum(row["counts"])
    saved = time.perf_counter()
    for number, (cell, runs) in enumerate(plan.items(), 1):
        while (done := sum(counts[cell])) < runs and not decided(cell, counts[cell]):
            for i in range(done, min(done + BATCH, runs)):
                counts[cell][DECISIONS.index(judged(cell, i))] += 1
            if target is not None and time.perf_counter() - saved > 20:
                save(target, digest, counts)
                saved = time.perf_counter()
        made = sum(map(sum, counts.values())) - made_before
        pace = (time.perf_counter() - started) / max(made, 1)
        left = sum(list(plan.values())[number:]) * pace / 60
        print(f"[{number}/{len(plan)}] {cell} {counts[cell]}, at most {left:.0f} min left",
              flush=True)  # fmt: skip
    if target is not None:
        save(target, digest, counts)
    return counts


def decided(cell: Cell, row: list[int]) -> bool:
    """Whether a harmed slice's aim is met or missed beyond doubt, looked at now and then."""
    if not cell.harmed or not sum(row) or sum(row) % LOOK:
        return False
    low, high = wilson(row[0], sum(row))
    return high <= AIM_HARM or low > AIM_HARM


def save(path: Path, digest: str, counts: dict[Cell, list[int]]) -> None:
    """Everything that a later run needs to go on, and a reader to make other tables."""
    rows = [{**asdict(cell), "counts": row} for cell, row in counts.items() if sum(row)]
    write_json(path, {"command": COMMAND, "decisions": DECISIONS, "code": digest, "cells": rows})


# --- tables --------------------------------------------------------------------------------------


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def share(counts: list[int], which: int = 0) -> str:
    """`93 % [90, 95]`."""
    n = sum(counts)
    low, high = wilson(counts[which], n)
    return f"{100 * counts[which] / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def ratio(a: list[int], b: list[int]) -> tuple[float, float, float]:
    """Ratio of two independent proportions with its 95 % interval (Katz 1978, on logs)."""
    (x, m), (y, n) = (a[0], sum(a)), (b[0], sum(b))
    if not x or not y:
        return 0.0, 0.0, float("inf")
    half = 1.96 * np.sqrt(1 / x - 1 / m + 1 / y - 1 / n)
    value = x / m / (y / n)
    return value, value * np.exp(-half), value * np.exp(half)


def best_possible(cell: Cell, runs: int = 20_000) -> float:
    """Share of the power without slices that the best rule keeps which promotes a slice that loses
    5 points in 5 % at most: each slice's own mean must exceed one threshold (Neyman & Pearson)."""
    rng, k, rows = np.random.default_rng(0), cell.slices, cell.n // cell.slices

    def drawn(gains: list[float]) -> tuple[np.ndarray, np.ndarray]:
        means, squares = np.empty((runs, k)), np.empty((runs, k))
        for j, g in enumerate(gains):
            differ = (1 - SHARED) / 3  # 2 E[p (1 - p)], shifted by the gain
            counts = rng.multinomial(
                rows, [differ / 2 + g / 2, differ / 2 - g / 2, 1 - differ], size=runs
            )
            means[:, j] = (counts[:, 0] - counts[:, 1]) / rows
            squares[:, j] = (counts[:, 0] + counts[:, 1]) / rows
        whole = means.mean(axis=1)
        se = np.sqrt((squares.mean(axis=1) - whole**2) / cell.n)
        return means.min(axis=1), whole > 1.96 * se

    gain = cell.gain / 100
    lowest, better = drawn([-0.05] + [gain] * (k - 1))
    alike, passed = drawn([gain] * k)
    for threshold in np.linspace(-0.2, 0.05, 501):
        if (better & (lowest > threshold)).mean() <= AIM_HARM:
            return float((passed & (alike > threshold)).mean() / passed.mean())
    return 0.0


def report(counts: dict[Cell, list[int]]) -> str:
    """All tables as Markdown."""
    parts = [_PREFACE.format(command=COMMAND), "## Aims\n", *aims(counts)]
    plain = [c for c in counts if not c.harmed and not c.clustered and c.metrics == 1]
    parts += ["\n## One metric, alike slices\n", *grid(counts, plain)]
    parts += ["\n## Several metrics (em, f1, chrF, BLEU of the same answers)\n"]
    parts += grid(counts, [c for c in counts if c.metrics > 1 and not c.harmed])
    parts += [f"\n## Clusters: {DOCUMENT} questions on a document, half of them paraphrases\n"]
    parts += grid(counts, [c for c in counts if c.clustered and not c.harmed])
    parts += ["\n## One slice truly loses 5 points, the others gain\n"]
    parts += grid(counts, [c for c in counts if c.harmed])
    return "\n".join([*parts, ""])


def grid(counts: dict[Cell, list[int]], chosen: list[Cell]) -> list[str]:
    """One row per situation: P(PROMOTE) with its interval, P(REJECT), P(INCONCLUSIVE)."""
    lines = ["| n | slices | metrics | true gain | PROMOTE | REJECT | INCONCLUSIVE | runs |",
             "|---:|---|---:|---:|---|---:|---:|---:|"]  # fmt: skip
    order = sorted(chosen, key=lambda c: (c.clustered, c.metrics, c.n, c.slices, c.gain))
    for c in order:
        row, n = counts[c], sum(counts[c])
        slices = str(c.slices)
        if c.harmed:
            slices += f", the harmed one of {c.harmed_rows}" + (
                " in clusters" if c.clustered else ""
            )
        lines.append(
            f"| {c.n} | {slices} | {c.metrics} | {c.gain:+g} | {share(row)} "
            f"| {row[1] / n:.1%} | {row[2] / n:.1%} | {n} |"
        )
    return lines


def aims(counts: dict[Cell, list[int]]) -> list[str]:
    """Each aim with what was measured, and whether the interval decides it."""
    null = max((c for c in counts if c.gain == 0), key=lambda c: counts[c][0] / sum(counts[c]))
    lines = [
        f"- No gain: promoted most often at {_where(null)}: {share(counts[null])}; the aim is "
        f"{GATES.alpha:.0%} at most. All such situations together: "
        f"{share(list(map(sum, zip(*(counts[c] for c in counts if c.gain == 0)))))}.",  # noqa: B905
        "- A slice of at least 200 examples that truly loses 5 points, promoted "
        f"(aim: {AIM_HARM:.0%} at most):",
    ]
    for c in counts:
        if c.harmed and c.harmed_rows >= GATES.severe_loss_examples:
            low, high = wilson(counts[c][0], sum(counts[c]))
            lines.append(
                f"  - {_where(c)}: {share(counts[c])}: {_state(low, high, AIM_HARM, True)}"
            )
    lines += ["- Power with ten alike slices by that without (aim: "
              f"{AIM_POWER} at least; where slices hold 200 examples, beside it what the best rule "
              "could keep that promotes a harmed slice in 5 %):"]  # fmt: skip
    for c in counts:
        without = Cell(c.n, 0, c.gain)
        if c.slices != 10 or c.gain <= 0 or c.harmed or c.clustered or c.metrics > 1:
            continue
        value, low, high = ratio(counts[c], counts[without])
        best = ""
        if c.n // c.slices >= GATES.severe_loss_examples:
            best = f"; possible {best_possible(c):.2f}"
        state = _state(low, high, AIM_POWER, False)
        lines.append(f"  - {_where(c)}: {value:.2f} [{low:.2f}, {high:.2f}]{best}: {state}")
    return lines


def _where(c: Cell) -> str:
    words = [f"n {c.n}", f"{c.slices} slices", f"{c.gain:+g} points"]
    if c.harmed:
        words.append(f"harmed slice of {c.harmed_rows}")
    words += [f"{c.metrics} metrics"] * (c.metrics > 1) + ["clusters"] * c.clustered
    return ", ".join(words)


def _state(low: float, high: float, aim: float, at_most: bool) -> str:
    met, missed = (high <= aim, low > aim) if at_most else (low >= aim, high < aim)
    return "met" if met else "missed" if missed else "open"


_PREFACE = """# Power of the verdict

Written by `{command}`: every row is a situation with a known truth, judged again and again by
`bem.judge` with the costs waived and all other gates at their defaults. Exact match, difficulty
beta(1, 1), 70 % of the answers shared. Intervals are 95 % (Wilson). "met" and "missed" only where the
interval decides, else "open".
"""


def main() -> None:
    """All cells, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few runs, printed, not written")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    target = None if options.quick else options.out / "power.json"
    counts = run(cells(options.quick), target)
    text = report(counts)
    print(text)
    if target is not None:
        write_text(options.out / "power.md", text)


if __name__ == "__main__":
    main()
