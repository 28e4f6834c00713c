"""Where multiplying the ranks of all experts stops paying: dense against gathered, beside the linear.

    python benchmarks/experts.py                  # writes benchmarks/results/experts.md, about 5 CPU minutes
    python benchmarks/experts.py --seconds 0.1    # per cell; a tenth of a second is a rough look
    python benchmarks/experts.py --device cuda    # wall-clock seconds between synchronisations

One frozen linear layer with 1 to 64 experts of rank 4 to 32, in three situations: decoding one row,
decoding eight rows of which each follows another expert, and a prefill of 256 tokens whose four chunks
follow four experts. On a CPU: seconds of one thread, which other programs on the machine hardly disturb.
The three arms take turns, every figure is a median over the rounds.

Nothing is read back to see which blocks are in use: the gathered form multiplies as many experts as the
rows of the control could use. While a chunk is decoded its control stays the same tensor, and the blocks
are looked up once per chunk; that lookup is timed on its own and a 64th of it is added to each token.
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
from dataclasses import dataclass, replace
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bem.experts.slab import GATHER_ABOVE, SitePack  # noqa: E402
from bem.experts.stack import ExpertStack  # noqa: E402

SIZES = [(192, 192), (512, 192), (2048, 2048), (5632, 2048)]  # d_in -> d_out
EXPERTS, RANKS = (1, 2, 4, 8, 16, 32, 64), (4, 8, 16, 32)
CHUNK = 64
TASKS = {"decode 1": (1, 1), "decode 8": (8, 1), "prefill 256": (1, 256)}  # (sequences, tokens)
DENSE, GATHERED = "dense", "gathered"


@dataclass(frozen=True)
class Cell:
    """Seconds of one call."""

    d_in: int
    d_out: int
    task: str
    experts: int
    rank: int
    linear: float
    dense: float
    gathered: float

    @property
    def used(self) -> int:
        """Experts whose ranks the gathered form multiplies."""
        sequences, tokens = TASKS[self.task]
        return min(self.experts, sequences * rows_of(tokens))

    @property
    def spared(self) -> int:
        """Numbers in U and V that the gathered form does not multiply."""
        return (self.experts - self.used) * self.rank * (self.d_in + self.d_out)

    @property
    def share(self) -> float:
        """The same in units of the frozen linear's weights."""
        return self.spared / (self.d_in * self.d_out)

    def loss(self, gathered: bool) -> float:
        """How much longer the layer takes than with the faster form."""
        chosen = self.gathered if gathered else self.dense
        return (self.linear + chosen) / (self.linear + min(self.dense, self.gathered)) - 1.0


SPARED: Callable[[Cell], float] = lambda cell: cell.spared  # noqa: E731
SHARE: Callable[[Cell], float] = lambda cell: cell.share  # noqa: E731


def main() -> None:
    """Measure all cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.75, help="seconds for each cell")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "experts.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_device(options.device)
    cells = []
    with torch.no_grad():
        for d_in, d_out in SIZES:
            weight = torch.randn(d_out, d_in) / d_in**0.5
            for experts in EXPERTS:
                for rank in RANKS:
                    forms = make_forms(d_in, d_out, experts, rank)
                    for task in TASKS:
                        cells.append(measure(forms, weight, task, options.seconds))
            print(f"{d_in} -> {d_out} done", file=sys.stderr)
    text = page(cells, options.device)
    Path(options.out).write_text(text, encoding="utf-8")
    print(text)


def rows_of(tokens: int) -> int:
    """Rows of one sequence's control table: in a prefill one stands for the chunk before."""
    return 1 if tokens == 1 else tokens // CHUNK + 1


def make_forms(d_in: int, d_out: int, experts: int, rank: int) -> dict[str, SitePack]:
    """Random experts, packed for either form; the numbers do not matter for the time."""
    stack = ExpertStack(d_in, d_out, [rank] * experts)
    for u in stack.u.values():
        u.data.normal_()
    forms = {}
    for form in (DENSE, GATHERED):
        stack.mounting = replace(stack.mounting, form=form, most=1)  # type: ignore[arg-type]
        forms[form] = stack.at(torch.float32)
    return forms


def measure(forms: dict[str, SitePack], weight: Tensor, task: str, seconds: float) -> Cell:
    """All arms of one cell, interleaved."""
    sequences, tokens = TASKS[task]
    d_out, d_in = weight.shape
    x, y = torch.randn(sequences, tokens, d_in), torch.randn(sequences, tokens, d_out)
    engine = forms[DENSE].engine
    table, slot = control_of(engine.owner, len(engine.ranks), sequences, tokens)

    def update(form: str, control: Tensor) -> None:
        forms[form].update(y, x, control, slot)

    def fresh() -> None:  # another tensor: what the first token of a chunk sees, and each prefill
        update(GATHERED, table.view(table.shape))

    decode = tokens == 1
    arms: dict[str, Callable[[], None]] = {
        "linear": lambda: _do(F.linear, x, weight),
        DENSE: lambda: update(DENSE, table),
        GATHERED: (lambda: update(GATHERED, table)) if decode else fresh,
        **({"fresh": fresh} if decode else {}),
    }
    times = interleaved(arms, seconds)
    gathered = times[GATHERED]
    if decode:
        gathered += max(0.0, times["fresh"] - gathered) / CHUNK
    experts, rank = len(engine.ranks), engine.largest
    return Cell(d_in, d_out, task, experts, rank, times["linear"], times[DENSE], gathered)


def control_of(
    owner: Tensor, experts: int, sequences: int, tokens: int
) -> tuple[Tensor, Tensor | None]:
    """(table, slot of each token): sequence s follows expert s, chunk c of a prefill expert c (modulo
    their number)."""
    rows = torch.arange(rows_of(tokens))
    expert = (torch.arange(sequences)[:, None] + rows.clamp(min=1)[None]).flatten() % experts
    table = (owner == expert[:, None]).float()
    return table, None if tokens == 1 else torch.arange(tokens) // CHUNK + 1


def interleaved(arms: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median seconds of each arm's call; arms take turns until the time is spent."""
    loops = {}
    for name, arm in arms.items():
        arm()  # warm-up
        once = timed(arm, 3)
        loops[name] = max(1, min(2000, int(2e-4 / max(once, 1e-7))))  # long enough for the clock
    times: dict[str, list[float]] = {name: [] for name in arms}
    end = clock() + seconds
    while clock() < end or min(map(len, times.values())) < 5:
        for name, arm in arms.items():
            times[name].append(timed(arm, loops[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def timed(arm: Callable[[], None], loops: int) -> float:
    """Seconds of one call."""
    start = clock()
    for _ in range(loops):
        arm()
    return (clock() - start) / loops


def clock() -> float:
    """CPU seconds of this thread; with a GPU wall-clock seconds, once it is done."""
    if torch.get_default_device().type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def mean_loss(cells: list[Cell], of: Callable[[Cell], float], threshold: float) -> float:
    """Mean loss of the rule: gathered where `of(cell)` is above the threshold."""
    return statistics.mean(cell.loss(cell.spared > 0 and of(cell) > threshold) for cell in cells)


def best_threshold(cells: list[Cell], of: Callable[[Cell], float]) -> float:
    """Where gathering should start: the threshold of the smallest mean loss."""
    return min([0.0, *sorted({of(c) for c in cells})], key=lambda t: mean_loss(cells, of, t))


def page(cells: list[Cell], device: str) -> str:
    """The results as Markdown."""
    spared, share = best_threshold(cells, SPARED), best_threshold(cells, SHARE)
    machine = (
        f"CPU seconds of one thread, {platform.machine()}, shared virtual machine"
        if device == "cpu"
        else f"wall-clock seconds on one {torch.cuda.get_device_name()}"
    )
    lines = [
        "# Experts side by side: dense or gathered",
        "",
        f"Written by `python benchmarks/experts.py{'' if device == 'cpu' else ' --device ' + device}`: {machine},",
        f"medians of interleaved rounds, float32, torch {torch.__version__}. The dense form multiplies the ranks of all",
        "experts for each token, the gathered form those of as many experts as the rows of the control could",
        "use (one each): the difference is the weights spared. Costs are what the experts add, in units of the",
        "frozen linear's own time in the same cell; a mean loss compares linear and experts with the faster form.",
        "Each cell's weights stay in the caches as far as they fit.",
        "",
        "| rule: gathered where it spares | mean loss against the faster form of each cell |",
        "|---|---|",
        f"| more than {GATHER_ABOVE:,} weights (in use) | {mean_loss(cells, SPARED, GATHER_ABOVE):.1%} |",
        f"| more than {spared:,.0f} weights (best of its kind) | {mean_loss(cells, SPARED, spared):.1%} |",
        f"| more than {share:.0%} of the linear's weights (best of its kind) | {mean_loss(cells, SHARE, share):.1%} |",
        f"| never | {mean_loss(cells, SHARE, math.inf):.1%} |",
        f"| anything | {mean_loss(cells, SHARE, 0.0):.1%} |",
        "",
        "| linear | task | pays above, weights spared | linear, us | mean loss of the rule in use |",
        "|---|---|---|---|---|",
    ]
    for d_in, d_out in SIZES:
        for task in TASKS:
            own = [c for c in cells if (c.d_in, c.d_out, c.task) == (d_in, d_out, task)]
            linear = statistics.median(c.linear for c in own) * 1e6
            loss = mean_loss(own, SPARED, GATHER_ABOVE)
            start = best_threshold(own, SPARED)
            lines.append(
                f"| {d_in} -> {d_out} | {task} | {start:,.0f} | {linear:.0f} | {loss:.1%} |"
            )
    lines += ["", "## Every cell", "", "Dense / gathered, as a share of the linear's time.", ""]
    for d_in, d_out in SIZES:
        lines += detail([c for c in cells if (c.d_in, c.d_out) == (d_in, d_out)])
    return "\n".join(lines).rstrip() + "\n"


def detail(cells: list[Cell]) -> list[str]:
    """One table for a size: a line for each number of experts and rank."""
    by = {(c.experts, c.rank, c.task): c for c in cells}
    lines = [
        f"### {cells[0].d_in} -> {cells[0].d_out}",
        "",
        f"| experts x rank | {' | '.join(TASKS)} |",
        f"|---|{'---|' * len(TASKS)}",
    ]
    for experts in EXPERTS:
        for rank in RANKS:
            own = [by[experts, rank, task] for task in TASKS]
            costs = " | ".join(
                f"{c.dense / c.linear:.0%} / {c.gathered / c.linear:.0%}" for c in own
            )
            lines.append(f"| {experts} x {rank} | {costs} |")
    return [*lines, ""]


def _do(function: Callable[..., Tensor], *args: Tensor) -> None:
    function(*args)


if __name__ == "__main__":
    main()
