"""Memory of the engine over thousands of small requests of every kind: does anything stay behind?

    python benchmarks/engine_memory.py     # bem-tiny with routed experts; writes benchmarks/results/engine_memory.md

Requests differ in prompt, length, sampling, grammar, number of answers, scored prompts, log-probabilities and version; some are
cancelled, some meet their deadline. The store's budget is small, so that it is full early. Resident memory is read from the
operating system after every part of the run, when nothing is under way.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402

import bem  # noqa: E402
from bem import Engine, Grammar, Request, Sampling  # noqa: E402
from bem.routing.mount import blank_expert  # noqa: E402

MIB = 1 << 20
FORMS = (
    Grammar.choice(["yes", "no"]),
    Grammar.regex("[a-z]{2,6}"),
    Grammar.json_schema({"type": "object", "properties": {"a": {"type": "boolean"}}}),
)


def request(number: int, generator: torch.Generator) -> Request:
    """One of many kinds, by its number."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    shared = [7 + i % 50 for i in range(64)] if number % 3 == 0 else []
    ids = shared + [draw(3, 1000) for _ in range(draw(2, 24))]
    fields: dict[str, Any] = {}
    if number % 5 == 1:
        fields |= {"n": 2, "logprobs": 2}
    if number % 7 == 2:
        fields |= {"prompt_logprobs": 1, "max_new_tokens": draw(0, 2)}
    if number % 11 == 3:
        fields["grammar"] = FORMS[draw(0, len(FORMS))]
    if number % 13 == 4:
        fields["version"] = "next"
    if number % 17 == 5:
        fields["timeout_s"] = 0.001
    if number % 19 == 6:
        fields["stop"] = ("e", "the")
    hot = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
    fields["sampling"] = hot if number % 2 else Sampling()
    return Request(ids, **{"max_new_tokens": draw(2, 7), **fields})


def serve(engine: Engine, numbers: range, generator: torch.Generator) -> int:
    """Serve these; returns the answers handed out."""
    answers, left = 0, list(numbers)
    while left or engine.busy:
        while left and len(engine.waiting) < 64:
            given = engine.submit(request(number := left.pop(0), generator))
            if number % 23 == 7:
                engine.cancel(given)
        answers += len(engine.step().finished)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--parts", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/engine_memory.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = bem.load_base("bem-tiny")
    mounted = bem.mount(model, [blank_expert(model, f"e{i}", 8) for i in range(4)])
    engine = Engine(mounted, tokenizer, slots=32, cache_gib=1 / 64)
    engine.keep("next", mounted.shadow())
    generator, began, lines = torch.Generator().manual_seed(0), time.process_time(), []
    size, process = options.requests // options.parts, psutil.Process()
    for part in range(options.parts):
        answers = serve(engine, range(part * size, (part + 1) * size), generator)
        gc.collect()
        stats, resident = engine.store.stats, process.memory_info().rss / MIB
        held = f"{stats.nbytes / MIB:.1f} | {stats.evicted} | {time.process_time() - began:.0f}"
        lines.append(f"| {(part + 1) * size} | {answers} | {resident:.1f} | {held} |")
        print(lines[-1], flush=True)
    head = [
        "# Memory of the engine\n",
        f"bem-tiny with 4 experts, one thread, {engine.slots} slots, a store of {engine.store.budget / MIB:.0f} MiB. "
        f"`python benchmarks/engine_memory.py --requests {options.requests} --parts {options.parts}`, "
        f"torch {torch.__version__}.\n",
        "| requests | answers of this part | resident, MiB | store, MiB | tokens thrown out | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    options.out.write_text("\n".join([*head, *lines, ""]))


if __name__ == "__main__":
    main()
