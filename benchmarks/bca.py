"""10,000-resample BCa intervals: ours, scipy (best batch), arch. CPU time, memory, agreement.

    python benchmarks/bca.py [--large]         # all cells, writes benchmarks/results/bca.md
    python benchmarks/bca.py one METHOD N M    # one cell (what the full run starts for each)

Each cell runs in a fresh process with one BLAS thread, after a warm-up, medians over repetitions.
CPU seconds are the headline: wall time on a shared machine measures the neighbours.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

B = 10_000
BATCHES = (1 << 18, 1 << 20, 1 << 21)  # cells per scipy batch; the fastest one counts
CELLS = [(10_000, 8), (10_000, 1), (1_000, 8), (1_000, 1)]
LARGE = [(100_000, 1)]  # only with --large: scipy takes a minute a run
METHODS = {  # name: (repetitions at n * m <= 10,000, and above)
    "bem, auto (saddlepoint)": (25, 15),
    "bem, auto (exact, EM data)": (25, 15),
    "bem, weights": (9, 5),
    "scipy, best batch": (3, 1),
    "scipy, default batch": (1, 0),
    "arch": (3, 1),
}


def data(method: str, n: int, m: int) -> np.ndarray:
    """Skewed, heavy-tailed differences; EM differences in {-1, 0, 1} for the exact engine."""
    rng = np.random.default_rng(20_240 + n + m)
    if "EM" in method:
        return rng.choice([-1.0, 0.0, 1.0], p=[0.06, 0.86, 0.08], size=(n, m))
    return rng.lognormal(0, 1, (n, m)) - rng.lognormal(0, 1, (n, m)) + 0.05


def run(method: str, x: np.ndarray, seed: int, batch: int | None = None) -> np.ndarray:
    """[2, m] interval ends."""
    if method.startswith("bem"):
        from bem.stats import Statistic, joint_bca
        from bem.stats.weights import ratio

        ones = np.ones(len(x))
        statistics = [Statistic("", np.stack([c, ones], axis=1), ratio) for c in x.T]
        engine = "weights" if "weights" in method else "auto"
        found = joint_bca(statistics, B, seed=seed, engine=engine)
        return np.array([[r.lower for r in found], [r.upper for r in found]])
    if method.startswith("scipy"):
        from scipy.stats import bootstrap

        per_batch = None if batch is None else max(1, batch // x.size)
        result = bootstrap((x,), np.mean, n_resamples=B, batch=per_batch, method="BCa", rng=seed)
        return np.array([result.confidence_interval.low, result.confidence_interval.high])
    from arch.bootstrap import IIDBootstrap

    return IIDBootstrap(x, seed=seed).conf_int(lambda z: z.mean(0), reps=B, method="bca")


def one(method: str, n: int, m: int) -> dict:
    """Measure one cell in this process."""
    x = data(method, n, m)
    batches = BATCHES if method == "scipy, best batch" else (None,)
    batches = batches[-1:] if n >= 100_000 else batches  # others were slower, at 40 s each
    repetitions = METHODS[method][n * m > 10_000]
    run(method, x[:50], 1, batches[0])
    best: dict = {}
    for batch in batches:
        before = _rss_bytes()
        seconds, wall, ends = [], [], np.empty(0)
        for k in range(repetitions):
            cpu, clock = time.process_time(), time.perf_counter()
            ends = run(method, x, 7 + k, batch)
            seconds.append(time.process_time() - cpu)
            wall.append(time.perf_counter() - clock)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        cell = {
            "cpu": float(np.median(seconds)),
            "wall": float(np.median(wall)),
            "rss": max(0, peak),
        }
        if not best or cell["cpu"] < best["cpu"]:
            best = {**cell, "ends": ends.tolist(), "batch": batch}
    if n * m <= 80_000 and best["cpu"] < 1 and not method.startswith("arch"):
        tracemalloc.start()  # numpy's own allocations: exact where pages were already mapped
        run(method, x, 7, best["batch"])
        best["traced"] = tracemalloc.get_traced_memory()[1]
    se = x.std(axis=0) / np.sqrt(n)
    return {"method": method, "n": n, "m": m, "se": se.tolist(), **best}


def main() -> None:
    """All cells, then the table."""
    rows: list[dict] = []
    target = ROOT / "benchmarks" / "results" / "bca.md"
    target.parent.mkdir(exist_ok=True)
    for n, m in CELLS + (LARGE if "--large" in sys.argv else []):
        for method, repetitions in METHODS.items():
            if not repetitions[n * m > 10_000] or (n >= 100_000 and method == "arch"):
                continue  # 100,000 examples take arch a minute and 1.4 GiB
            command = [sys.executable, __file__, "one", method, str(n), str(m)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            if done.returncode:
                print(method, n, m, done.stderr.strip().splitlines()[-1:], flush=True)
                continue
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            r = rows[-1]
            print(f"{method:28} n={n:<7} m={m}  {r['cpu']:.5f} s  {_memory(r):.1f} MiB", flush=True)
            target.write_text(_table(rows))
    print(f"wrote {target}")


def _table(rows: list[dict]) -> str:
    head = "| n x metrics | method | CPU s | against scipy | extra MiB | largest end-point gap |"
    lines = [head, "|---|---|---|---|---|---|"]
    for n, m in CELLS + LARGE:
        cell = {r["method"]: r for r in rows if (r["n"], r["m"]) == (n, m)}
        scipy, reference = cell.get("scipy, best batch"), cell.get("bem, auto (saddlepoint)")
        for method, r in cell.items():
            ratio = f"{scipy['cpu'] / r['cpu']:.1f}x" if scipy else "-"
            apart = "-"
            if reference and "EM" not in method and r is not reference:
                gap = np.abs(np.array(r["ends"]) - np.array(reference["ends"])) / reference["se"]
                apart = f"{gap.max():.3f} se"
            name = f"{n:,} x {m}"
            lines.append(
                f"| {name} | {method} | {r['cpu']:.5f} | {ratio} | {_memory(r):.1f} | {apart} |"
            )
    return _PREFACE.format(b=B, machine=platform.processor() or platform.machine()) + "\n".join(
        [*lines, ""]
    )


_PREFACE = """# BCa intervals of the mean, {b:,} resamples

Written by `python benchmarks/bca.py`, all cells in one run, each in a fresh process, one BLAS
thread, warm-up, medians of CPU seconds ({machine}, shared virtual machine). End points are compared
with our saddlepoint ones in standard errors of the mean; the Monte-Carlo noise of {b:,} resamples
alone is about 0.03 to 0.05 (one standard deviation), and the largest of all ends is shown. scipy's
best batch is the fastest of 2^18, 2^20 and 2^21 cells (at 100,000 examples 2^21). EM data are other
data, so their ends are not compared. `weights` is the Monte-Carlo engine that also serves clusters,
slices and corpus BLEU and chrF; all columns share one resample. Memory is the larger of the growth
of the resident set and numpy's traced peak.

"""


def _memory(row: dict) -> float:
    return max(row["rss"], row.get("traced", 0)) / 2**20


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
