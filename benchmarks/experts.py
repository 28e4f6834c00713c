"""Where multiplying the ranks of all experts stops paying: dense against gathered, beside the linear.

    python benchmarks/experts.py                  # writes benchmarks/results/experts.md, about 5 CPU minutes
    python benchmarks/experts.py --seconds 0.1    # per cell; a tenth of a second is a rough look

One frozen linear layer with 1 to 64 experts of rank 4 to 32, in three situations: decoding one row,
decoding eight rows of which each follows another expert, and a prefill of 256 tokens whose four chunks
follow four experts. CPU seconds of one thread: other programs on the machine hardly disturb them. The
three arms take turns, every figure is a median over the rounds.

While a chunk is decoded its control stays the same tensor, and the gathered form looks up the blocks in
use once per chunk; that lookup is timed on its own and a 64th of it is added to each token.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bem.experts import stack as module  # noqa: E402
from bem.experts.stack import FEW_TOKENS, GATHER_ABOVE, ExpertStack  # noqa: E402

SIZES = [(192, 192), (512, 192), (2048, 2048), (5632, 2048)]  # d_in -> d_out
EXPERTS, RANKS = (1, 2, 4, 8, 16, 32, 64), (4, 8, 16, 32)
CHUNK = 64
CROWD_SIZES, CROWDS = (192, 2048), (8, 16, 32, 64, 128)
TASKS = {"decode 1": (1, 1), "decode 8": (8, 1), "prefill 256": (1, 256)}  # (rows, tokens)
DENSE, GATHERED = "dense", "gathered"


@dataclass(frozen=True)
class Cell:
    """CPU seconds of one call."""

    d_in: int
    d_out: int
    task: str
    experts: int
    rank: int
    linear: float
    dense: float
    gathered: float

    @property
    def weights(self) -> int:
        """Numbers in U and V of all experts: what the dense form multiplies for each token."""
        return self.experts * self.rank * (self.d_in + self.d_out)

    @property
    def share(self) -> float:
        """The same in units of the frozen linear's weights."""
        return self.weights / (self.d_in * self.d_out)

    def loss(self, gathered: bool) -> float:
        """How much longer the layer takes than with the faster form."""
        chosen = self.gathered if gathered else self.dense
        return (self.linear + chosen) / (self.linear + min(self.dense, self.gathered)) - 1.0


WEIGHTS: Callable[[Cell], float] = lambda cell: cell.weights  # noqa: E731
SHARE: Callable[[Cell], float] = lambda cell: cell.share  # noqa: E731


def main() -> None:
    """Measure all cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.75, help="CPU seconds for each cell")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "experts.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells, crowds = [], []
    with torch.no_grad():
        for d_in, d_out in SIZES:
            weight = torch.randn(d_out, d_in) / d_in**0.5
            for experts in EXPERTS:
                for rank in RANKS:
                    stack = make_stack(d_in, d_out, experts, rank)
                    cells += [
                        measure(stack, weight, t, experts, rank, options.seconds) for t in TASKS
                    ]
            print(f"{d_in} -> {d_out} done", file=sys.stderr)
        for d in CROWD_SIZES:
            crowds += [crowd(d, tokens, options.seconds) for tokens in CROWDS]
    text = page(cells, crowds)
    Path(options.out).write_text(text, encoding="utf-8")
    print(text)


def make_stack(d_in: int, d_out: int, experts: int, rank: int) -> ExpertStack:
    """Random experts; the numbers do not matter for the time."""
    stack = ExpertStack(d_in, d_out, [rank] * experts)
    stack.u.normal_()
    return stack


def measure(
    stack: ExpertStack, weight: Tensor, task: str, experts: int, rank: int, seconds: float
) -> Cell:
    """All arms of one cell, interleaved."""
    rows, tokens = TASKS[task]
    (d_out, d_in) = weight.shape
    x, y = torch.randn(rows, tokens, d_in), torch.randn(rows, tokens, d_out)
    control = make_control(stack, rows, tokens, rank)

    def update(form: str, control: Tensor) -> None:
        stack.gathered = form == GATHERED
        stack.update(y, x, control)

    def fresh() -> None:  # another tensor: what the first token of a chunk sees, and each prefill
        update(GATHERED, control.view(control.shape))

    decode = tokens == 1
    arms: dict[str, Callable[[], None]] = {
        "linear": lambda: _do(F.linear, x, weight),
        DENSE: lambda: update(DENSE, control),
        GATHERED: (lambda: update(GATHERED, control)) if decode else fresh,
        **({"fresh": fresh} if decode else {}),
    }
    found = interleaved(arms, seconds)
    gathered = found[GATHERED]
    if decode:
        gathered += max(0.0, found["fresh"] - gathered) / CHUNK
    return Cell(d_in, d_out, task, experts, rank, found["linear"], found[DENSE], gathered)


def crowd(d: int, tokens: int, seconds: float) -> str:
    """A line of the table: one token for each of many experts, in one product and block by block."""
    stack = make_stack(d, d, max(EXPERTS), 16)
    x, y = torch.randn(tokens, 1, d), torch.randn(tokens, 1, d)
    control = make_control(stack, tokens, 1, 16)

    def arm(few: int) -> Callable[[], None]:
        def call() -> None:
            module.FEW_TOKENS = few
            stack._update_gathered(y, x, control)

        return call

    found = interleaved({"one": arm(tokens), "blocks": arm(0)}, seconds)
    return f"| {d} -> {d} | {tokens} | {found['one'] * 1e6:.0f} | {found['blocks'] * 1e6:.0f} |"


def make_control(stack: ExpertStack, rows: int, tokens: int, rank: int) -> Tensor:
    """Row r follows expert r, chunk c of a prefill expert c (modulo their number)."""
    chunk = torch.arange(tokens) // CHUNK
    expert = (torch.arange(rows)[:, None] + chunk[None]) % len(stack.ranks)
    return (stack.owner == expert[..., None]).float()


def interleaved(arms: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median CPU seconds of each arm's call; arms take turns until the time is spent."""
    loops = {}
    for name, arm in arms.items():
        arm()  # warm-up
        once = timed(arm, 3)
        loops[name] = max(1, min(2000, int(2e-4 / max(once, 1e-7))))  # long enough for the clock
    times: dict[str, list[float]] = {name: [] for name in arms}
    end = time.process_time() + seconds
    while time.process_time() < end or min(map(len, times.values())) < 5:
        for name, arm in arms.items():
            times[name].append(timed(arm, loops[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def timed(arm: Callable[[], None], loops: int) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    for _ in range(loops):
        arm()
    return (time.process_time() - start) / loops


def mean_loss(cells: list[Cell], of: Callable[[Cell], float], threshold: float) -> float:
    """Mean loss of the rule: gathered where `of(cell)` is above the threshold."""
    return statistics.mean(cell.loss(of(cell) > threshold) for cell in cells)


def best_threshold(cells: list[Cell], of: Callable[[Cell], float]) -> float:
    """Where gathering should start: the threshold of the smallest mean loss."""
    return min([0.0, *sorted({of(c) for c in cells})], key=lambda t: mean_loss(cells, of, t))


def page(cells: list[Cell], crowds: list[str]) -> str:
    """The results as Markdown."""
    weights, share = best_threshold(cells, WEIGHTS), best_threshold(cells, SHARE)
    lines = [
        "# Experts side by side: dense or gathered",
        "",
        "Written by `python benchmarks/experts.py`: CPU seconds of one thread, medians of interleaved",
        f"rounds, float32, {platform.machine()}, shared virtual machine, torch {torch.__version__}. R is the number of ranks of",
        "all experts together. The dense form multiplies R (d_in + d_out) weights for each token, the",
        "gathered form those of the experts in use. Costs are what the experts add, in units of the frozen",
        "linear's own time in the same cell; a mean loss compares linear and experts with the faster form.",
        "Each cell's weights stay in the processor's caches as far as they fit; no GPU was measured, where",
        "starting a kernel costs more beside the work and the threshold may lie elsewhere.",
        "",
        "| rule: gathered where | mean loss against the faster form of each cell |",
        "|---|---|",
        f"| R (d_in + d_out) > {GATHER_ABOVE:,} weights (in use) | {mean_loss(cells, WEIGHTS, GATHER_ABOVE):.1%} |",
        f"| R (d_in + d_out) > {weights:,.0f} weights (best of its kind) | {mean_loss(cells, WEIGHTS, weights):.1%} |",
        f"| more than {share:.0%} of the linear's weights (best of its kind) | {mean_loss(cells, SHARE, share):.1%} |",
        f"| more than 10 % of the linear's weights | {mean_loss(cells, SHARE, 0.1):.1%} |",
        f"| never | {mean_loss(cells, SHARE, math.inf):.1%} |",
        f"| always | {mean_loss(cells, SHARE, -1.0):.1%} |",
        "",
        "| linear | task | gathered pays above | of the linear | linear, us | dense, gathered at 10 % | at most ranks |",
        "|---|---|---|---|---|---|---|",
    ]
    for d_in, d_out in SIZES:
        for task in TASKS:
            mine = [c for c in cells if (c.d_in, c.d_out, c.task) == (d_in, d_out, task)]
            lines.append(summary(mine))
    lines += [
        "",
        "## Many tokens, each with an expert of its own",
        "",
        f"Gathered, in microseconds: up to {FEW_TOKENS} tokens one product over all blocks in use (kept while a chunk is",
        "decoded), above one product for each block. Rank 16, as many experts as tokens, at most 64.",
        "",
        "| linear | tokens | in one | block by block |",
        "|---|---|---|---|",
        *crowds,
    ]
    lines += ["", "## Every cell", "", "Dense / gathered, as a share of the linear's time.", ""]
    for d_in, d_out in SIZES:
        lines += detail([c for c in cells if (c.d_in, c.d_out) == (d_in, d_out)])
    return "\n".join(lines).rstrip() + "\n"


def summary(cells: list[Cell]) -> str:
    """One line for a size and task."""
    near = min(cells, key=lambda c: abs(c.share - 0.1))
    most = max(cells, key=lambda c: c.share)
    first, start = cells[0], best_threshold(cells, WEIGHTS)
    parts = [
        f"{first.d_in} -> {first.d_out}",
        first.task,
        f"{start:,.0f} weights",
        f"{start / (first.d_in * first.d_out):.0%}",
        f"{statistics.median(c.linear for c in cells) * 1e6:.0f}",
        *(f"{c.dense / c.linear:.0%}, {c.gathered / c.linear:.0%}" for c in (near, most)),
    ]
    return f"| {' | '.join(parts)} |"


def detail(cells: list[Cell]) -> list[str]:
    """One table for a size: a line for each number of experts and rank."""
    by = {(c.experts, c.rank, c.task): c for c in cells}
    lines = [
        f"### {cells[0].d_in} -> {cells[0].d_out}",
        "",
        f"| experts x rank | share | {' | '.join(TASKS)} |",
        f"|---|---|{'---|' * len(TASKS)}",
    ]
    for experts in EXPERTS:
        for rank in RANKS:
            mine = [by[experts, rank, task] for task in TASKS]
            costs = " | ".join(
                f"{c.dense / c.linear:.0%} / {c.gathered / c.linear:.0%}" for c in mine
            )
            lines.append(f"| {experts} x {rank} | {mine[0].share:.1%} | {costs} |")
    return [*lines, ""]


def _do(function: Callable[..., Tensor], *args: Tensor) -> None:
    function(*args)


if __name__ == "__main__":
    main()
