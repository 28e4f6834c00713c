"""How often does `judge` promote a variant that is not better? 1,000 null variants per cell.

    python benchmarks/false_promotion.py --n 1000     # writes benchmarks/results/false_promotion.md

A null variant is no better on average than the baseline; most shapes draw both from the same law.
Costs are waived and the regression guards are opened wide, so that the quality gate alone stands
between a null variant and promotion: with all gates in force the rates can only be lower.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from scipy.stats import binomtest  # noqa: E402

from bem.config import GatesConfig  # noqa: E402
from bem.stats import Measurement, judge  # noqa: E402

Arms = tuple[dict[str, np.ndarray], dict[str, np.ndarray], Sequence[str] | None]
SIZES = (50, 200, 1000)
SEEDS = 3  # training seeds per arm
GATES = GatesConfig(
    n_bootstrap=4000, regression_margin_points=100.0, relative_margin=1e9,
    waived=("budget", "latency", "memory", "kv_hit"),
)  # fmt: skip


def em(rng: np.random.Generator, n: int) -> Arms:
    """Exact match over three seeds; examples differ in difficulty, many are never or always right."""
    hard = rng.beta(0.3, 0.4, n)
    draw = lambda: {"em": (rng.random((SEEDS, n)) < hard).astype(float)}  # noqa: E731
    return draw(), draw(), None


def qa(rng: np.random.Generator, n: int) -> Arms:
    """EM, F1 and chrF of the same answers: a family of three correlated metrics."""
    hard = rng.beta(0.5, 0.5, n)

    def draw() -> dict[str, np.ndarray]:
        right = rng.random((SEEDS, n)) < hard
        partial = np.where(rng.random((SEEDS, n)) < 0.5, rng.beta(1, 2, (SEEDS, n)), 0.0)
        f1 = np.where(right, 1.0, partial)
        chrf = np.clip(100 * (0.2 + 0.7 * f1) + rng.normal(0, 5, (SEEDS, n)), 0, 100)
        return {"em": right.astype(float), "f1": f1, "chrf": chrf}

    return draw(), draw(), None


def rare(rng: np.random.Generator, n: int) -> Arms:
    """One seed, 6 % of the examples change at all: what BCa alone is worst at."""
    right = rng.random(n) < 0.5
    flip = lambda: right ^ (rng.random(n) < 0.03)  # noqa: E731
    return {"em": flip().astype(float)}, {"em": flip().astype(float)}, None


def heavy(rng: np.random.Generator, n: int) -> Arms:
    """Answer loss with heavy tails: now and then an arm is lost on an example."""
    base = rng.gamma(2, 1, n)
    draw = lambda: {"loss": base + 0.1 * rng.standard_t(2.5, (SEEDS, n))}  # noqa: E731
    return draw(), draw(), None


def skewed(rng: np.random.Generator, n: int) -> Arms:
    """Left-skewed differences of mean zero: many small gains, few large losses."""
    d = np.exp(1.0) ** 0.5 - rng.lognormal(0, 1, n)
    return {"loss": np.full(n, 5.0)}, {"loss": 5.0 - d}, None


def clustered(rng: np.random.Generator, n: int) -> Arms:
    """EM and F1, documents of 1 to 8 examples, and each arm has its own luck with each document."""
    sizes = rng.integers(1, 9, n)
    labels = np.repeat(np.arange(n), sizes)[:n]
    hard = rng.normal(0, 1, n)[labels]

    def draw() -> dict[str, np.ndarray]:
        chance = 1 / (1 + np.exp(-hard - rng.normal(0, 1, n)[labels]))
        right = rng.random((SEEDS, n)) < chance
        return {"em": right.astype(float), "f1": np.where(right, 1.0, rng.beta(1, 3, (SEEDS, n)))}

    return draw(), draw(), [f"d{label}" for label in labels]


SHAPES: dict[str, Callable[[np.random.Generator, int], Arms]] = {
    "EM, 3 seeds": em,
    "EM + F1 + chrF": qa,
    "EM, 6 % discordant": rare,
    "loss, heavy tails": heavy,
    "loss, left-skewed": skewed,
    "EM + F1, clustered": clustered,
}


def measurement(
    name: str, metrics: dict[str, np.ndarray], clusters: Sequence[str] | None
) -> Measurement:
    """An arm without costs."""
    n = next(iter(metrics.values())).shape[-1]
    return Measurement(name, metrics, [str(i) for i in range(n)], clusters=clusters)


def one(task: tuple[str, int, int]) -> tuple[bool, bool]:
    """Whether a null variant was promoted, and whether some BCa limit alone lay above 0."""
    shape, n, number = task
    key = list(SHAPES).index(shape)
    baseline, candidate, clusters = SHAPES[shape](np.random.default_rng([key, n, number]), n)
    arms = [measurement("null", m, clusters) for m in (baseline, candidate)]
    verdict = judge(arms[0], {"null": arms[1]}, GATES)["null"]
    return verdict.accepted, any(e.primary and e.ci_low > 0 for e in verdict.effects)


def family(task: tuple[int, int]) -> bool:
    """Whether any of ten null variants, judged together on three metrics, was promoted."""
    n, number = task
    rng = np.random.default_rng([99, n, number])
    hard = rng.beta(0.5, 0.5, n)

    def draw() -> dict[str, np.ndarray]:
        right = rng.random((SEEDS, n)) < hard
        f1 = np.where(right, 1.0, rng.beta(1, 3, (SEEDS, n)))
        return {"em": right.astype(float), "f1": f1, "validity": np.where(f1 > 0.1, 1.0, 0.0)}

    baseline = measurement("null", draw(), None)
    candidates = {f"v{k}": measurement(f"v{k}", draw(), None) for k in range(10)}
    return any(v.accepted for v in judge(baseline, candidates, GATES).values())


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def main() -> None:
    """Every cell, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1000, help="null variants per cell")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    start = time.perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:
        lines = list(_lines(pool, options.n))
    text = _PREFACE.format(n=options.n, alpha=GATES.alpha) + "\n".join([*lines, ""])
    print(text, f"{time.perf_counter() - start:.0f} s")
    target = ROOT / "benchmarks" / "results" / "false_promotion.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text(text)


def _lines(pool: ProcessPoolExecutor, times: int):
    yield "| null variants | examples | promoted | 95 % interval | BCa lower limit > 0 alone |"
    yield "|---|---|---|---|---|"
    for shape in SHAPES:
        for n in SIZES:
            found = list(pool.map(one, [(shape, n, k) for k in range(times)], chunksize=20))
            promoted, alone = sum(f[0] for f in found), sum(f[1] for f in found)
            low, high = wilson(promoted, times)
            yield _show(
                f"| {shape} | {n} | {promoted / times:.1%} | {low:.1%} to {high:.1%} "
                f"| {alone / times:.1%} |"
            )
    for n in SIZES:
        rounds = max(1, times // 10)
        found = list(pool.map(family, [(n, k) for k in range(rounds)], chunksize=5))
        low, high = wilson(sum(found), rounds)
        yield _show(
            f"| any of 10 variants x 3 metrics ({rounds} families) | {n} "
            f"| {sum(found) / rounds:.1%} | {low:.1%} to {high:.1%} | |"
        )


def _show(line: str) -> str:
    print(line, flush=True)
    return line


_PREFACE = """# False promotions

Written by `python benchmarks/false_promotion.py --n {n}`: {n} null variants per row, judged at
alpha = {alpha} with the costs waived and the regression guards opened, so that the quality gate decides
alone. The rate must stay at or below alpha. The last column is what the BCa interval alone would
have let through in at least one metric: no false discovery control, no exact test, no guard against
skew and small counts.

"""

if __name__ == "__main__":
    main()
