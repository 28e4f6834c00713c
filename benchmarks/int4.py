"""Decoding on a CPU with four bits a weight beside bfloat16 and float32: layers by rows, and whole steps.

    python benchmarks/int4.py --base smollm2-135m        # writes benchmarks/results/int4.md

One thread, CPU seconds, all forms in turn in every round, medians. A decode step is one token of each row behind a
prompt of 128 tokens; a prefill is of 256 tokens.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import bem  # noqa: E402
from bem.bases import int4  # noqa: E402

FORMS = ("float32", "bfloat16", "int4")
ROWS, BATCHES = (1, 2, 4, 6, 8, 16), (1, 2, 4, 8)


def timed(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turns after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            started = time.process_time()
            work()
            if number:
                times[name].append(1e3 * (time.process_time() - started))
    return {name: float(np.median(each)) for name, each in times.items()}


def layers(model: Any, rounds: int) -> list[str]:
    """Every shape among the layers in both forms, at several numbers of rows."""
    found = {
        (m.in_features, m.out_features): m
        for m in model.modules()
        if isinstance(m, int4.Int4Linear)
    }
    lines = [
        "| layer | " + " | ".join(f"{r} row{'s' * (r > 1)}" for r in ROWS) + " |",
        "|---|" + "---:|" * len(ROWS),
    ]
    for (d_in, d_out), layer in found.items():
        cells = []
        for rows in ROWS:
            x = torch.randn(rows, d_in, dtype=torch.bfloat16)
            works = {
                "int4": partial(_four_bits, layer, x),
                "bfloat16": partial(F.linear, x, layer.weight),
            }
            t = timed(works, rounds * 10)
            cells.append(f"{t['int4'] / t['bfloat16']:.2f}")
        lines.append(f"| {d_in} to {d_out} | " + " | ".join(cells) + " |")
    return lines


def _four_bits(layer: int4.Int4Linear, x: Any) -> Any:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, layer.packed, int4.GROUP, layer.scales)


def steps(models: dict[str, Any], rounds: int) -> list[str]:
    """Tokens per CPU second of every form."""
    lines = ["| | " + " | ".join(FORMS) + " | int4 / bfloat16 |", "|---|" + "---:|" * 4]
    for batch in BATCHES:
        works = {name: _decoder(model, batch) for name, model in models.items()}
        lines.append(_row(f"decode, batch {batch}", timed(works, rounds), batch))
    ids = torch.randint(0, 1000, (1, 256))
    prefill = {name: (lambda m=m: m(ids, logits_to_keep=1)) for name, m in models.items()}
    lines.append(_row("prefill, 256 tokens", timed(prefill, max(3, rounds // 4)), 256))
    return lines


def _decoder(model: Any, batch: int) -> Callable[[], Any]:
    ids, mask = torch.randint(0, 1000, (batch, 128)), torch.ones(batch, 128, dtype=torch.long)
    cache = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values
    token = ids[:, :1]

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def _row(name: str, t: dict[str, float], tokens: int) -> str:
    rates = [f"{1e3 * tokens / t[form]:.1f}" for form in FORMS]
    return f"| {name} | " + " | ".join(rates) + f" | {t['bfloat16'] / t['int4']:.2f} |"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/int4.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {form: bem.load_base(args.base, dtype=form)[0] for form in FORMS}
    text = [
        "# Four bits a weight on a CPU",
        "",
        f"`python benchmarks/int4.py --base {args.base} --rounds {args.rounds}`, torch {torch.__version__}, "
        f"{platform.machine()}, one thread, CPU seconds.",
        "",
        "## One layer: time of the four-bit kernel divided by bfloat16's, by rows",
        "",
        *layers(models["int4"], args.rounds),
        "",
        f"So up to {int4.FEW} rows take four bits (`bem.bases.int4.FEW`).",
        "",
        "## A whole model: tokens per second",
        "",
        *steps(models, args.rounds),
        "",
        "The head stays in bfloat16: its weights are those of the embeddings, which are no blocks of four bits.",
        "",
    ]
    args.out.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
