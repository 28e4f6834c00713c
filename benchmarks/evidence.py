"""What evidence costs: before generation (search, rerank, record), and per token (V2 against PT1).

    python benchmarks/evidence.py                     # writes benchmarks/results/evidence.md
    python benchmarks/evidence.py --base FOLDER_OR_ID --device cuda

Questions and passages are those of the task `lookup`: real code of this Python installation. The time
before generation is wall time of one question at a time; the time per token is interleaved, CPU
seconds on one thread or CUDA events, and the ratio's limits are exact (Hodges-Lehmann).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import bem  # noqa: E402
from bem.adapters.copies import with_shared_weights  # noqa: E402
from bem.evidence.index import in_memory  # noqa: E402
from bem.evidence.rerank import load_reranker  # noqa: E402
from bem.evidence.retriever import Retriever  # noqa: E402
from bem.experiments.measuring.latency import measure_latency  # noqa: E402
from bem.stats.latency import paired_ratio  # noqa: E402
from bem.tasks.load import load_task  # noqa: E402

QUESTIONS = 200
SETTINGS = {
    "search alone": dict(reranker=False, candidates=10),
    "10 candidates reranked": dict(reranker=True, candidates=10),
    "20 candidates reranked": dict(reranker=True, candidates=20),
    "20 candidates, budget 6 ms": dict(reranker=True, candidates=20, timeout_ms=6.0),
}
ARMS = {
    "pt1": {"variant": "pt1"},
    "v2": {"variant": "v2"},
    "v2 without temperature": {"variant": "v2", "temperature": False},
    "s0": {"variant": "s0"},
}


def before_generation(device: str) -> list[str]:
    """Rows of the first table: milliseconds per question."""
    task = load_task("lookup", train_rows=QUESTIONS, dev_rows=1)
    index, reranker = in_memory(task.corpus), load_reranker("tiny", device)
    lines = []
    for name, settings in SETTINGS.items():
        chosen = {k: v for k, v in settings.items() if k != "reranker"}
        retriever = Retriever(index, reranker if settings["reranker"] else None, shown=2, **chosen)
        times, late = [], 0
        for row in [*task.train[:10], *task.train]:  # ten to warm up
            started = time.perf_counter()
            late += retriever.retrieve(row.input).record.timed_out
            times.append(1000 * (time.perf_counter() - started))
        p50, p95, p99 = np.percentile(times[10:], [50, 95, 99])
        lines.append(f"| {name} | {p50:.2f} | {p95:.2f} | {p99:.2f} | {late / len(times):.0%} |")
    return [f"{len(index.passages):,} passages, {len(task.train)} questions.\n", *_HEAD, *lines]


_HEAD = ["| | p50 ms | p95 ms | p99 ms | past the budget |", "|---|---:|---:|---:|---:|"]


def per_token(base: str, device: str, rounds: int) -> list[str]:
    """Rows of the second table: ratios to PT1."""
    model, _ = bem.load_base(base, device)
    arms = {n: bem.attach(with_shared_weights(model), **s, rank=12) for n, s in ARMS.items()}
    arms["base"] = model
    timings = measure_latency(arms, rounds=rounds, prompt_tokens=256, new_tokens=64)
    lines = [
        "| arm | decode ms per token | ÷ pt1 | prefill ms | ÷ pt1 |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, p50 in timings.p50_ms.items():
        cells = []
        for phase in ("decode", "prefill"):
            mine, reference = (timings.latency_ms[a][phase] for a in (name, "pt1"))
            r = paired_ratio(mine, reference)
            limits = "" if name == "pt1" else f" [{r.lower:.3f}, {r.upper:.3f}]"
            cells += [f"{p50[phase]:.2f}", f"{r.ratio:.3f}{limits}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="bem-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/evidence.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.device == "cpu":
        machine = f"{platform.machine()}, one torch thread"
    else:
        machine = torch.cuda.get_device_name()
    text = [
        "# What evidence costs\n",
        f"`python benchmarks/evidence.py`; {options.base}, {machine}, torch {torch.__version__}.\n",
        "## Before generation\n",
        *before_generation(options.device),
        "\n## Per token\n",
        f"{options.rounds} interleaved rounds, 256 prompt tokens, 64 decoded; limits 95 % one-sided.\n",
        *per_token(options.base, options.device, options.rounds),
    ]
    options.out.write_text("\n".join(text) + "\n")
    print("\n".join(text), f"\nWritten to {options.out}")


if __name__ == "__main__":
    main()
