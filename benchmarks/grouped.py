"""How V of a head-gated update is multiplied: group by group in two orders, or as one matrix with zeros.

    python benchmarks/grouped.py            # writes benchmarks/results/grouped.md, about a CPU minute

`kernels.reference.masked_low_rank` takes the groups as one batch, V_g X_g^T; `HeadGate.ready` hands it V as
one matrix where at most FEW_ROWS rows are decoded. Between two calls 32 MB are written, so that the
weights come from memory, as they do behind the base's own. CPU seconds of one thread, medians.
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
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bem.kernels.reference import _grouped  # noqa: E402
from bem.variants.head_gate import FEW_ROWS  # noqa: E402

WIDTHS, RANKS, TOKENS = (512, 1024, 2048, 4096), (8, 16, 32), (1, 8, 32, 128, 512)
GROUPS = 4


def forms(width: int, rank: int, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """Three ways to the same product."""
    v = torch.randn(GROUPS, rank // GROUPS, width // GROUPS)
    dense, x = torch.block_diag(*v), torch.randn(tokens, width)
    slices = x.view(tokens, GROUPS, -1).transpose(0, 1)
    turned = v.transpose(1, 2)
    return {
        "V X": lambda: _grouped(x, v),
        "X V": lambda: torch.bmm(slices, turned).transpose(0, 1).reshape(tokens, rank),
        "one matrix": lambda: F.linear(x, dense),
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
    parser.add_argument("--repeats", type=int, default=40)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    junk = torch.zeros(8_000_000)
    rows = [
        "# A head-gated update's V: group by group, or as one matrix",
        "",
        f"Written by `python benchmarks/grouped.py`: CPU microseconds of one thread, medians of {repeats}, "
        f"float32, torch {torch.__version__}; weights out of the caches. {GROUPS} groups. `V X` is what "
        f"`masked_low_rank` does; one matrix is used for at most {FEW_ROWS} decoded rows.",
        "",
        "| width | rank | tokens | V X | X V | one matrix |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    with torch.inference_mode():
        for width in WIDTHS:
            for rank in RANKS:
                for tokens in TOKENS:
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
