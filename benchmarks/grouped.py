"""A head-gated update whose V is multiplied group by group in two orders, or as one matrix with zeros.

    python benchmarks/grouped.py            # writes benchmarks/results/grouped.md, about a CPU minute

`kernels.reference.masked_low_rank` takes the groups as one batch, V_g X_g^T; `HeadGate.ready` takes `few_grouped`,
X_g V_g^T, where at most FEW_ROWS rows are decoded. One matrix would be four times as large. Between two calls 32 MB are
written, so that the weights come from memory, as they do behind the base's own. CPU seconds of one thread, medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bem.kernels.reference import FEW_ROWS, few_grouped, masked_low_rank  # noqa: E402

WIDTHS, RANKS = (512, 1024, 2048), (8, 16, 32)
DECODED, PROMPTS = (1, 2, 8, 32), (128, 512)
GROUPS = 4


def forms(width: int, rank: int, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """Three ways to the same update, of tokens decoded in a row each or of a prompt."""
    v, u, c = (
        torch.randn(GROUPS, rank // GROUPS, width // GROUPS),
        torch.randn(width, rank),
        torch.rand(tokens, rank),
    )
    turned, dense = v.mT, torch.block_diag(*v)
    x, y = torch.randn(2, tokens, 1, width)
    shape = (1, tokens, width) if tokens in PROMPTS else x.shape
    x_, y_ = x.view(shape), y.view(shape)
    return {
        "V X": lambda: masked_low_rank(y_, x_, v, c, None, u),
        "X V": lambda: few_grouped(y, x, turned, c, u),
        "one matrix": lambda: masked_low_rank(y_, x_, dense, c, None, u),
    }


def microseconds(run: Callable[[], Tensor], repeats: int, junk: Tensor) -> float:
    taken = []
    for _ in range(repeats):
        junk.add_(1)
        start = time.process_time_ns()
        run()
        taken.append(time.process_time_ns() - start)
    return statistics.median(taken) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    junk = torch.zeros(8_000_000)
    rows = [
        "# A head-gated update: V group by group, or as one matrix",
        "",
        f"Written by `python benchmarks/grouped.py`: CPU microseconds of one thread, medians of {repeats}, "
        f"float32, torch {torch.__version__}; weights out of the caches. {GROUPS} groups. `V X` is `masked_low_rank`, "
        f"`X V` is `few_grouped`, used for at most {FEW_ROWS} decoded rows; one matrix is V with zeros, {GROUPS} times as large. "
        f"Up to {DECODED[-1]} tokens are decoded ones, a row each, more are a prompt.",
        "",
        "| width | rank | tokens | V X | X V | one matrix |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    with torch.inference_mode():
        for width in WIDTHS:
            for rank in RANKS:
                for tokens in (*DECODED, *PROMPTS):
                    found = {
                        name: microseconds(run, repeats, junk)
                        for name, run in forms(width, rank, tokens).items()
                    }
                    cells = " | ".join(f"{us:.0f}" for us in found.values())
                    rows.append(f"| {width} | {rank} | {tokens} | {cells} |")
                    print(rows[-1], flush=True)
    (ROOT / "benchmarks" / "results" / "grouped.md").write_text("\n".join([*rows, ""]))


if __name__ == "__main__":
    main()
