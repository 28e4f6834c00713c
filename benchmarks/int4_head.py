"""The head of a base in four or eight bits: what decoding gains, and what the distribution over tokens loses.

    python benchmarks/int4_head.py                      # writes benchmarks/results/int4_head.md

Time: of the head alone, one thread, CPU seconds, all forms in turn, medians. Quality: behind every token of this project's own
README and docs (bfloat16 blocks, so that only the head differs): nats per token, Kullback-Leibler divergence from
the float32 head, and how often the most likely token is another one.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import bem  # noqa: E402
from bem.bases.int4 import GROUP, Int4Linear  # noqa: E402
from benchmarks.int4 import timed  # noqa: E402

ROWS = (1, 2, 4, 8)
LENGTH = 256


def forms(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> bfloat16 hidden states (rows, d_model) to logits."""
    linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    four = Int4Linear.of(linear)
    scale = weight.abs().amax(1, keepdim=True) / 127
    eight = (weight / scale).round().to(torch.int8)
    halves = packed_halves(weight)
    return {
        "float32": lambda x: F.linear(x.float(), weight),
        "bfloat16": partial(F.linear, weight=weight.bfloat16()),
        "eight bits": partial(
            torch.ops.aten._weight_int8pack_mm, mat2=eight, scales=scale[:, 0].bfloat16()
        ),
        "four bits": lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, four.packed, GROUP, four.scales
        ),
        "eight bits, as two halves": lambda x: sum(
            torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)
            for packed, scales in halves
        ),
    }


def packed_halves(weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Q8_0 blocks, weight = d * q with q in -127 to 127, as (16 * d) * high + d * low: two weights of four bits."""
    groups = weight.view(len(weight), -1, GROUP)
    d = (groups.abs().amax(-1) / 127).half().float()
    q = (groups / d.clamp(min=1e-12)[..., None]).round().clamp(-127, 127).to(torch.int32)
    print(
        f"off the file's blocks by {float((q * d[..., None] - groups).abs().max()):.1e}", flush=True
    )
    high, low = q >> 4, q & 15  # -8 to 7, 0 to 15
    made = []
    # what the kernel computes is (level - 8) * scale + zero
    for level, scale, zero in ((high + 8, 16 * d, torch.zeros_like(d)), (low, d, 8 * d)):
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(level.view_as(weight).int(), 1)
        scales = torch.stack([scale, zero], -1).transpose(0, 1).contiguous().bfloat16()
        made.append((packed, scales))
    return made


def speed(heads: dict[str, Callable], width: int, rounds: int) -> list[str]:
    """Milliseconds by rows."""
    lines = [
        "| head | " + " | ".join(f"{r} row{'s' * (r > 1)}, ms" for r in ROWS) + " |",
        "|---|" + "---:|" * len(ROWS),
    ]
    times = {}
    for rows in ROWS:
        x = torch.randn(rows, width, dtype=torch.bfloat16)
        times[rows] = timed({name: partial(head, x) for name, head in heads.items()}, rounds)
    for name in heads:
        lines.append(f"| {name} | " + " | ".join(f"{times[r][name]:.2f}" for r in ROWS) + " |")
    return lines


def states(base: str, tokens: int) -> tuple[Tensor, Tensor]:
    """(hidden states that enter the head, the token behind each)."""
    model, tokenizer = bem.load_base(base, dtype="bfloat16")
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    ids = tokenizer("\n".join(f.read_text(encoding="utf-8") for f in files))["input_ids"][:tokens]
    parts = [ids[at : at + LENGTH] for at in range(0, len(ids), LENGTH)]
    found = [model.model(torch.tensor([p])).last_hidden_state[0, :-1] for p in parts]
    return torch.cat(found), torch.tensor([t for p in parts for t in p[1:]])


def quality(heads: dict[str, Callable], hidden: Tensor, targets: Tensor) -> list[str]:
    """What each head makes of the same states."""
    sums = {name: torch.zeros(3, dtype=torch.double) for name in heads}
    for at in range(0, len(hidden), 64):
        x, own = hidden[at : at + 64], targets[at : at + 64]
        logp = {name: head(x).float().log_softmax(-1) for name, head in heads.items()}
        exact = logp["float32"]
        for name, given in logp.items():
            kl = (exact.exp() * (exact - given)).sum(-1)
            other = given.argmax(-1) != exact.argmax(-1)
            nll = F.nll_loss(given, own, reduction="none")
            sums[name] += torch.stack([nll.sum(), kl.sum(), other.sum()]).double()
    lines = [
        "| head | nats per token | KL from float32 | another most likely token |",
        "|---|---:|---:|---:|",
    ]
    for name, total in sums.items():
        nll, kl, other = (total / len(hidden)).tolist()
        lines.append(f"| {name} | {nll:.4f} | {kl:.5f} | {100 * other:.1f} % |")
    return lines


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/int4_head.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden, targets = states(args.base, args.tokens)
    exact, _ = bem.load_base(args.base, dtype="float32")
    heads = forms(exact.get_output_embeddings().weight.detach())
    text = [
        "# The head in four or eight bits",
        "",
        f"`python benchmarks/int4_head.py --base {args.base} --rounds {args.rounds} --tokens {args.tokens}`, "
        f"torch {torch.__version__}, {platform.machine()}, one thread, CPU seconds.",
        "",
        *speed(heads, hidden.shape[1], args.rounds),
        "",
        f"Behind {len(hidden):,} tokens of README and docs:",
        "",
        *quality(heads, hidden, targets),
        "",
        "Four bits move the distribution. A Q4_1 file holds its head in Q8_0 blocks: as two halves of four bits these are computed "
        "exactly but for the scales' rounding. The head of `dtype: int4` is in bfloat16 so far.",
        "",
    ]
    args.out.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
