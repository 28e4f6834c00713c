"""BM25 alone against BM25 and the shipped reranker, on questions that nothing was trained on.

    python benchmarks/reranker.py --data DIR_OF_THE_PUBLIC_SETS     # writes benchmarks/results/reranker.md

MRR@10 of the first right passage among BM25's top 20, the paired difference with its BCa interval
(clusters: title, question, article, module), how well the probabilities are calibrated, and the
time of a query. `--folder` measures another reranker.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np  # noqa: E402
import reranker_pairs as rp  # noqa: E402
import torch  # noqa: E402

from bem.evidence.rerank import Reranker, load_reranker  # noqa: E402
from bem.stats import Bca, bca_bootstrap  # noqa: E402

CANDIDATES = 20
BINS = 10


def reciprocal_rank(order: np.ndarray, right: np.ndarray, k: int = 10) -> float:
    places = np.flatnonzero(right[order[:k]])
    return 1 / (1 + places[0]) if places.size else 0.0


def measure(reranker: Reranker, pairs: rp.PairSet, lexical: bool = True) -> dict[str, np.ndarray]:
    """Per question: MRR before and after, cluster; per candidate: probability and whether right."""
    before, after, groups, found, p, truth = [], [], [], [], [], []
    for candidates in rp.first_stage(pairs, CANDIDATES):
        right = np.array(candidates.right(), dtype=bool)
        texts = [pairs.pool[row] for row in candidates.rows]
        logits = reranker.logits(
            candidates.question.query, texts, candidates.lexical if lexical else None
        )
        assert logits is not None
        before.append(reciprocal_rank(np.arange(len(right)), right))
        after.append(reciprocal_rank(np.argsort(-logits, kind="stable"), right))
        groups.append(candidates.question.group)
        found.append(right.any())
        p.append(1 / (1 + np.exp(-logits)))
        truth.append(right)
    return {
        "before": np.array(before),
        "after": np.array(after),
        "groups": np.array(groups),
        "found": np.array(found),
        "p": np.concatenate(p),
        "truth": np.concatenate(truth),
    }


def calibration(p: np.ndarray, truth: np.ndarray) -> tuple[float, float, float, float]:
    """Expected calibration error over equal-width bins, mean p, share right, Brier skill."""
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    error = sum(
        abs(p[bins == b].mean() - truth[bins == b].mean()) * (bins == b).mean()
        for b in range(BINS)
        if (bins == b).any()
    )
    skill = 1 - ((p - truth) ** 2).mean() / truth.var()
    return float(error), float(p.mean()), float(truth.mean()), float(skill)


def milliseconds(reranker: Reranker, pairs: rp.PairSet, k: int, n: int = 100) -> list[float]:
    """Seconds of single calls with k candidates; every passage is new to the caches only once."""
    asked = rp.PairSet(pairs.name, pairs.pool, pairs.questions[:n])
    times = []
    for candidates in rp.first_stage(asked, k):
        texts = [pairs.pool[row] for row in candidates.rows]
        if len(texts) == k:
            started = time.perf_counter()
            reranker.logits(candidates.question.query, texts, candidates.lexical)
            times.append(1000 * (time.perf_counter() - started))
    return times


def interval(bca: Bca) -> str:
    return f"{bca.observed:+.4f} [{bca.lower:+.4f}, {bca.upper:+.4f}]"


def report(reranker: Reranker, sets: list[rp.PairSet]) -> str:
    results = {pairs.name: measure(reranker, pairs) for pairs in sets}
    without = {pairs.name: measure(reranker, pairs, lexical=False) for pairs in sets}
    lines = [
        "# Reranker: measured",
        "",
        f"`python benchmarks/reranker.py` · {reranker.name} · top {CANDIDATES} of BM25 · "
        f"{platform.machine()}, 1 thread, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        "",
        "Nothing here was trained or calibrated on: dev questions, dev passages, dev modules; half "
        "of the clusters of each set served to choose between checkpoints, this is the other. The "
        "three Wikipedia sets search one pool of passages; in-list is the share of questions "
        "whose right passage is among the candidates, the most that any reranker can reach. "
        "`all` weighs the four sets alike.",
        "",
        "## Order",
        "",
        "| set | questions | clusters | in-list | BM25 MRR@10 | reranked | difference [95 % BCa] | "
        "p | without BM25 scores given |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        d = r["after"] - r["before"]
        bca = bca_bootstrap(d, clusters=r["groups"].tolist())
        lines.append(
            f"| {name} | {len(d)} | {len(set(r['groups']))} | {r['found'].mean():.3f} | "
            f"{r['before'].mean():.4f} | {r['after'].mean():.4f} | {interval(bca)} | "
            f"{bca.p_value:.2g} | {without[name]['after'].mean():.4f} |"
        )
    lines.append(_overall(results, without))
    lines += [
        "",
        "## Probabilities",
        "",
        f"Over all candidates; expected calibration error with {BINS} equal bins; skill = 1 - Brier "
        "score / that of always giving the set's own share.",
        "",
        "| set | candidates | right | mean p | calibration error | skill |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        error, mean, share, skill = calibration(r["p"], r["truth"])
        lines.append(
            f"| {name} | {len(r['p'])} | {share:.3f} | {mean:.3f} | {error:.3f} | {skill:+.3f} |"
        )
    p = np.concatenate([r["p"] for r in results.values()])
    truth = np.concatenate([r["truth"] for r in results.values()])
    error, mean, share, skill = calibration(p, truth)
    lines.append(f"| all | {len(p)} | {share:.3f} | {mean:.3f} | {error:.3f} | {skill:+.3f} |")
    lines += ["", "| p | candidates | mean p | share right |", "|---|---|---|---|"]
    for b in range(BINS):
        inside = np.minimum((p * BINS).astype(int), BINS - 1) == b
        if inside.any():
            lines.append(
                f"| {b / BINS:.1f} to {(b + 1) / BINS:.1f} | {inside.sum()} | "
                f"{p[inside].mean():.3f} | {truth[inside].mean():.3f} |"
            )
    lines += ["", "## Time of one query", "", "| candidates | p50 ms | p90 ms |", "|---|---|---|"]
    for k in (10, CANDIDATES):
        times = milliseconds(reranker, sets[0], k)
        lines.append(f"| {k} | {np.median(times):.1f} | {np.quantile(times, 0.9):.1f} |")
    return "\n".join(lines) + "\n"


def _overall(results: dict, without: dict) -> str:
    """Mean over sets: each question weighs 1 / (size of its set)."""
    n = sum(len(r["after"]) for r in results.values())
    weights = [n / (len(results) * len(r["after"])) for r in results.values()]
    d = [w * (r["after"] - r["before"]) for w, r in zip(weights, results.values(), strict=True)]
    clusters = [f"{name}:{g}" for name, r in results.items() for g in r["groups"]]
    bca = bca_bootstrap(np.concatenate(d), clusters=clusters)
    before, after, alone = (
        float(np.mean([r[key].mean() for r in found.values()]))
        for found, key in ((results, "before"), (results, "after"), (without, "after"))
    )
    found = np.mean([r["found"].mean() for r in results.values()])
    # the mean over clusters' sums divides by n; observed differences match the columns
    return (
        f"| all | {n} | {len(set(clusters))} | {found:.3f} | {before:.4f} | {after:.4f} | "
        f"{interval(bca)} | {bca.p_value:.2g} | {alone:.4f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public sets")
    parser.add_argument("--folder", default="tiny", help="`tiny`, or another reranker")
    parser.add_argument("--side", choices=("choose", "report"), default="report")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/reranker.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = report(load_reranker(args.folder), rp.held_out_sets(args.data, args.side))
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
