"""Random schedules of the engine against `generate`: thousands of them, in as many sittings as it takes.

    python benchmarks/engine_schedules.py --schedules 10000     # writes benchmarks/results/engine_schedules.md

Requests join, leave, are cancelled or run out of time; conversations go on; chunks are thrown out, purged and pinned;
versions are swapped, kept and dropped (`tests/engine/schedules.py`). Every answer is compared token by token with what
`generate` of its version gives to its prompt alone; nothing may be left behind. A schedule is its seed: what
was played is kept in --state, and a second call goes on there. One thread, CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bem.files import write_text  # noqa: E402
from tests.engine.schedules import Played, played  # noqa: E402

SAVED_EVERY = 10
NOTHING: dict[str, Any] = {"next": 0, "seconds": 0.0, "counts": {}, "failed": []}


def counts_of(schedule: Played) -> Counter[str]:
    """What happened in a schedule."""
    stats = schedule.engine.store.stats
    reasons = Counter(f"ended: {reason}" for reason in schedule.reasons)
    facts = {
        "answers": sum(reasons.values()),
        "tokens compared": schedule.compared,
        "prompt tokens": stats.needed,
        "prompt tokens reused": stats.reused,
        "tokens thrown out": stats.evicted,
        "steps with two or more versions": schedule.mixed,
    }
    return Counter(facts) + reasons + Counter({f"event: {k}": n for k, n in schedule.count.items()})


def play(seed: int, state: dict[str, Any]) -> None:
    """One schedule; a failure is noted with its seed."""
    began = time.process_time()
    try:
        state["counts"] = dict(Counter(state["counts"]) + counts_of(played(seed)))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        state["failed"].append([seed, f"{type(error).__name__}: {error} ({where.name})"])
        print(f"seed {seed}: {state['failed'][-1][1]}", flush=True)
    state["seconds"] += time.process_time() - began
    state["next"] = seed + 1


def report(state: dict[str, Any], command: str) -> str:
    """Markdown."""
    failed = state["failed"]
    lines = [
        "# Random schedules of the engine",
        "",
        f"`{command}`, torch {torch.__version__}, one thread: {state['next']} schedules (seeds 0 to {state['next'] - 1}), "
        f"{state['seconds']:.0f} CPU seconds, **{len(failed)} failed**.",
        "",
        "A llama of two blocks with three experts and a router, chunks of four tokens, one to four slots; every answer is "
        "compared with `generate` of the version under which it began.",
        "",
        "| what | number |",
        "|---|---:|",
        *(f"| {name} | {number:,} |" for name, number in sorted(state["counts"].items())),
        *(f"| seed {seed} | {what} |" for seed, what in failed),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--state", type=Path, default=ROOT / "runs" / "engine_schedules.json")
    parser.add_argument("--seconds", type=float, default=1e9, help="CPU seconds of this sitting")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/engine_schedules.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    state = json.loads(args.state.read_text()) if args.state.exists() else dict(NOTHING)
    while state["next"] < args.schedules and time.process_time() - began < args.seconds:
        play(state["next"], state)
        if state["next"] % SAVED_EVERY == 0 or state["next"] == args.schedules:
            write_text(args.state, json.dumps(state))
            command = f"python benchmarks/engine_schedules.py --schedules {args.schedules}"
            write_text(args.out, report(state, command))
    sys.exit(bool(state["failed"]))


if __name__ == "__main__":
    main()
