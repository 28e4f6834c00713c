"""What training and measuring read twice, and no longer do: CPU seconds before and after, on the same conversations.

    python benchmarks/reading.py --base smollm2-135m         # writes benchmarks/results/reading.md

tracing      every expert on every conversation: the blocks below the experts were read once for each expert
explaining   held-out conversations for the report: one by one through all blocks; now in batches, up to the router's
measuring    a greedy answer and the loss of the reference: the prompt was read for both

Every pair is run in turn in one process on one thread, after a short warm-up; results are compared.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import bem  # noqa: E402
from bem.config import CloningConfig  # noqa: E402
from bem.experiments.routing import transcript  # noqa: E402
from bem.experts.expert import Update, from_updates  # noqa: E402
from bem.routing.explain import explain  # noqa: E402
from bem.routing.mount import blank_expert  # noqa: E402
from bem.training import chunk_losses  # noqa: E402
from bem.training.answers import greedy_decoded  # noqa: E402
from bem.training.data import Example, encode  # noqa: E402
from bem.training.row_losses import answer_losses, losses_behind  # noqa: E402
from bem.training.traces import trace  # noqa: E402


def conversations(n: int) -> list[Example]:
    """Two turns each, of this project's own sentences."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = [line.strip(" |-#") for line in text.splitlines() if 60 < len(line) < 150]
    four = [lines[4 * i : 4 * i + 4] for i in range(n)]
    return [Example(str(i), c, (d,), history=((a, b),)) for i, (a, b, c, d) in enumerate(four)]


def routed(model: Any, experts: int) -> Any:
    """Random experts and a router with random weights."""
    generator, made = torch.Generator().manual_seed(0), []
    for number in range(experts):
        born = blank_expert(model, f"e{number}", 8)
        updates = {
            site: Update(0.02 * torch.randn(u.u.shape, generator=generator), u.v)
            for site, u in born.updates.items()
        }
        made.append(from_updates(born.name, updates, "random"))
    mounted = bem.mount(model, made)
    mounted.router.trained = True
    return mounted


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds, what it gave)."""
    began = time.process_time()
    made = work()
    return time.process_time() - began, made


def tracing(mounted: Any, encoded: list, batch: int) -> tuple[float, float, str]:
    """Seconds before and after, and how the results compare."""

    def under(kept: int) -> tuple[float, Any]:
        chunk_losses.KEPT = kept
        return timed(
            lambda: trace(mounted, encoded, 0, CloningConfig(), batch, experts_alone=True).experts
        )

    (before, a), (after, b) = under(0), under(1 << 30)
    return before, after, "equal to the bit" if np.array_equal(a, b) else "differ"


def explaining(mounted: Any, tokenizer: Any, rows: list[Example], batch: int):
    """The same."""
    artifacts: Any = SimpleNamespace(
        encoded=lambda row: encode(row, tokenizer, 512),
        config=SimpleNamespace(eval_batch_size=batch),
        inputs=SimpleNamespace(tokenizer=tokenizer, pad_id=0),
    )

    def singly() -> list[list[str]]:
        each = [artifacts.encoded(row) for row in rows]
        return [[c.expert for c in explain(mounted, e.input_ids, e.turn_starts)] for e in each]

    before, a = timed(singly)
    after, read = timed(lambda: transcript._read(mounted, artifacts, rows))
    b = [[c.expert for c in one.chunks] for one in read]
    return before, after, "same experts" if a == b else "differ"


def measuring(mounted: Any, tokenizer: Any, rows: list[Example], new: int):
    """The same."""
    prompts = [encode(row, tokenizer, 512, with_answer=False) for row in rows]
    wholes = [encode(row, tokenizer, 512) for row in rows]
    answers, decoded = timed(lambda: greedy_decoded(mounted.model, tokenizer, prompts, new))
    whole, a = timed(lambda: answer_losses(mounted, wholes, 0)[0])
    behind, b = timed(lambda: losses_behind(mounted, decoded, prompts, wholes, 0))
    assert b is not None
    off = max(abs(x - y) for x, y in zip(a, b[0], strict=True))
    return answers + whole, answers + behind, f"losses differ by {off:.1e} nats at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/reading.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = bem.load_base(args.base)
    mounted, rows = routed(model.eval(), args.experts), conversations(args.rows)
    encoded = [encode(row, tokenizer, 512) for row in rows]
    mounted.model.eval()
    explain(mounted, encoded[0].input_ids, encoded[0].turn_starts)
    works = {
        f"tracing under {args.experts} experts and the base": tracing(mounted, encoded, args.rows),
        "explaining": explaining(mounted, tokenizer, rows, args.rows),
        f"measuring, {args.new} new tokens": measuring(mounted, tokenizer, rows, args.new),
    }
    tokens = sum(map(len, encoded))
    text = [
        "# What is no longer read twice",
        "",
        f"`python benchmarks/reading.py --base {args.base} --rows {args.rows} --experts {args.experts} --new {args.new}`, "
        f"torch {torch.__version__}, float32, one thread, CPU seconds; {args.rows} conversations of {tokens} tokens.",
        "",
        "| | before | after | times as fast | results |",
        "|---|---:|---:|---:|---|",
        *(f"| {name} | {a:.1f} | {b:.1f} | {a / b:.2f} | {same} |" for name, (a, b, same) in works.items()),
        "",
    ]  # fmt: skip
    args.out.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
