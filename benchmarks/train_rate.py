"""How many tokens a second an adapter is trained with, and how many of those computed are padding.

    python benchmarks/train_rate.py                          # writes benchmarks/results/train_rate.md
    python benchmarks/train_rate.py --before ../older        # with the code of an older checkout beside it
    python benchmarks/train_rate.py --data DIR               # rows of the public sets instead of the embedded ones

Every arm is a process of its own with its own copy of the base, on one thread; the arms take turns, one
step each, in an order drawn anew for every round, so that drift of the machine cancels. All see the same
rows. Ours and PEFT's padded arm see them in the same batches; PEFT's grouped arm sees them sorted by
length in batches of like length, as `group_by_length` of transformers' Trainer does. A step is what each
would do with them: forward, loss, backward, clipping, AdamW. Rates count tokens that are no padding, per
CPU second of the arm's process.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
if "--serve" not in sys.argv:  # an arm gets the code that it shall run from PYTHONPATH
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

RANK, RATE = 8, 3e-3
PADDED, GROUPED, BEFORE = "PEFT LoRA, padded", "PEFT LoRA, grouped by length", ", before"
ROUTED = "BEM, 3 experts, a route each"
ARMS = {"BEM s0": "s0", "BEM v1": "v1", ROUTED: "experts", PADDED: "peft", GROUPED: "peft"}
EMBEDDED = ("sig2json", "lookup", "forms", "continue")
PUBLIC = ("json_snips", "sql_wikisql", "gen_rnnlg", "qa_babi", "cmd_tldr")
MASKED = -100
HELD = ExitStack()  # as long as an arm's process lives: inside, experts are trained


@dataclass(frozen=True)
class Row:
    """One example as token ids."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    turn_starts: list[bool]


@dataclass(frozen=True)
class Step:
    """What one step took."""

    tokens: int  # without padding
    padding: float  # share of the computed tokens
    seconds: float  # CPU seconds
    loss: float


# --- an arm, in a process of its own --------------------------------------------------------------


def serve(kind: str, base: str, dtype: str, path: str) -> None:
    """Take the step whose number comes in on each line; answer with a `Step`. -1: warm up."""
    torch.set_num_threads(1)
    batches = pickle.loads(Path(path).read_bytes())
    step = (peft_arm if kind == "peft" else bem_arm)(kind, base, dtype)
    for line in sys.stdin:
        number = int(line)
        rows = batches[number] if number >= 0 else batches[0][:2]
        started = time.process_time()
        padding, loss = step(rows)
        seconds = time.process_time() - started
        made = Step(sum(len(r["input_ids"]) for r in rows), padding, seconds, loss)
        print("step", json.dumps(asdict(made)), flush=True)


Stepper = Callable[[Sequence[dict[str, Any]]], tuple[float, float]]


def bem_arm(kind: str, base: str, dtype: str) -> Stepper:
    """`Trainer.step`, whatever it does with the rows."""
    import bem
    from bem.config import TrainingConfig
    from bem.training.data import Encoded
    from bem.training.trainer import Trainer

    model, tokenizer = bem.load_base(base, dtype=dtype)  # type: ignore[arg-type]
    experts = kind == "experts"
    attached: Any = mounted(model) if experts else bem.attach(model, kind, rank=RANK)
    config = TrainingConfig(steps=1000, learning_rate=RATE, warmup=0.0)
    if experts:
        HELD.enter_context(attached.training("experts"))
    attached.model.train()
    trainer = Trainer(attached, tokenizer, config, seed=0)

    def step(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
        routes = [[1 + i % 3] * len(r["input_ids"]) if experts else [] for i, r in enumerate(rows)]
        made = [Encoded(**r, route=route) for r, route in zip(rows, routes, strict=True)]
        result = trainer.step(made)
        computed = len(rows) * max(len(row["input_ids"]) for row in rows)  # one batch, padded
        return getattr(result, "padding", 1 - result.tokens / computed), result.loss

    return step


def mounted(model: Any) -> Any:
    """Three blank experts, to be trained side by side."""
    import bem
    from bem.routing.mount import blank_expert

    return bem.mount(model, [blank_expert(model, name, RANK) for name in "abc"])


def peft_arm(kind: str, base: str, dtype: str) -> Stepper:
    """A LoRA on the layers that BEM's s0 adapts, fed as transformers' Trainer feeds it."""
    from peft import LoraConfig, get_peft_model

    import bem
    from bem.adapters.sites import find_sites

    loaded: tuple[Any, Any] = bem.load_base(base, dtype=dtype)  # type: ignore[arg-type]
    model, pad = loaded[0], loaded[1].pad_token_id
    sites = find_sites(model)
    adapted = [site.name for site in sites.above(sites.router_layer(None))]
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=adapted, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def step(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([[*v, *[filler] * (longest - len(v))] for v in values])

        ids = [row["input_ids"] for row in rows]
        mask = padded([[1] * len(each) for each in ids], 0)
        labels = padded([row["labels"] for row in rows], MASKED)
        loss = model(input_ids=padded(ids, pad), attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return 1 - float(mask.float().mean()), float(loss.detach())

    return step


# --- rounds ---------------------------------------------------------------------------------------


def encoded_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """`batch * rounds` rows, the tasks in turn."""
    import bem
    from bem.tasks.load import load_task, training_mixture
    from bem.training.data import encode

    _, tokenizer = bem.load_base(args.base)
    need = args.batch * args.rounds
    names = PUBLIC if args.data else EMBEDDED
    tasks = [load_task(n, args.data, train_rows=-(-need // len(names)), dev_rows=1) for n in names]
    mixture = training_mixture(tasks)
    chosen = np.random.default_rng(0).permutation(len(mixture))[:need]
    rows = [encode(mixture[i], tokenizer, args.max_length) for i in chosen]
    return [asdict(Row(r.input_ids, r.labels, r.prompt_length, r.turn_starts)) for r in rows]


def in_batches(rows: list[dict[str, Any]], size: int, grouped: bool) -> list[list[dict[str, Any]]]:
    """Rows of each round; grouped: transformers sorts 50 batches at a time, which is more than these."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"])) if grouped else rows
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    order = np.random.default_rng(1).permutation(len(batches)) if grouped else range(len(batches))
    return [batches[i] for i in order]


class Arm:
    """A process that trains."""

    def __init__(self, name: str, kind: str, code: Path, dtype: str, base: str, rows: Path):
        self.name = name
        command = [sys.executable, __file__, "--serve", kind, "--base", base, "--dtype", dtype]
        self.process = subprocess.Popen(
            [*command, "--rows", str(rows)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(code)},
        )

    def step(self, number: int) -> Step:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("step "):
                return Step(**json.loads(line[5:]))
        raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}.")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(args: argparse.Namespace, dtype: str, folder: Path) -> dict[str, list[Step]]:
    """Steps of every arm, one a round."""
    files = {grouped: folder / f"{grouped}.pkl" for grouped in (False, True)}
    named = {name: (kind, ROOT) for name, kind in ARMS.items()}
    if args.before:
        older = {
            n + BEFORE: (k, Path(args.before))
            for n, k in ARMS.items()
            if n not in (*PEFT_ARMS, ROUTED)
        }
        named = older | named
    arms = [
        Arm(name, kind, code, dtype, args.base, files[name == GROUPED])
        for name, (kind, code) in named.items()
        if not args.arms or any(part in name for part in args.arms)
    ]
    found: dict[str, list[Step]] = {arm.name: [] for arm in arms}
    rng = np.random.default_rng(0)
    try:
        for number in range(-1, args.rounds):
            for i in rng.permutation(len(arms)):
                made = arms[i].step(number)
                if number >= 0:
                    found[arms[i].name].append(made)
            print(f"{dtype}: round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    finally:
        for arm in arms:
            arm.close()
    return found


PEFT_ARMS = (PADDED, GROUPED)


# --- report ---------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median: percentile bootstrap over rounds."""
    drawn = np.random.default_rng(0).choice(values, (1000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def rates(steps: list[Step]) -> list[float]:
    return [step.tokens / step.seconds for step in steps]


def against(mine: list[Step], other: list[Step]) -> str:
    """Ratio of two arms' rates, round by round."""
    ratios = [a / b for a, b in zip(rates(mine), rates(other), strict=True)]
    low, high = interval(ratios)
    return f"**{statistics.median(ratios):.2f}** [{low:.2f}, {high:.2f}]"


def whole(steps: list[Step]) -> float:
    """Tokens a second over all rounds."""
    return sum(s.tokens for s in steps) / sum(s.seconds for s in steps)


def padding(steps: list[Step]) -> float:
    """Share of all computed tokens."""
    return 1 - sum(s.tokens for s in steps) / sum(s.tokens / (1 - s.padding) for s in steps)


def table(found: dict[str, list[Step]]) -> list[str]:
    rows = [
        "| arm | median tokens/s | all tokens / all seconds | padding | / PEFT padded [95 %] | / PEFT grouped, whole |",
        "|---|---|---|---|---|---|",
    ]
    for name, steps in found.items():
        beside = against(steps, found[PADDED]) if PADDED in found and name != GROUPED else "-"
        grouped = f"{whole(steps) / whole(found[GROUPED]):.2f}" if GROUPED in found else "-"
        rows.append(
            f"| {name} | {statistics.median(rates(steps)):.0f} | {whole(steps):.0f} | {padding(steps):.1%} "
            f"| {beside} | {grouped} |"
        )
    return [*rows, ""]


def report(args: argparse.Namespace, results: dict[str, Any], lengths: Sequence[int]) -> str:
    import peft
    import transformers

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [row.split(":", 1)[1].strip() for row in lines if row.startswith("model name")]
    bf16 = any("avx512_bf16" in row for row in lines)
    tasks = ", ".join(PUBLIC if args.data else EMBEDDED)
    parts = [
        "# Rate of training",
        "",
        f"`python benchmarks/train_rate.py{' --before OLDER' if args.before else ''}"
        f"{' --data DIR' if args.data else ''}{' --arms ' + ' '.join(args.arms) if args.arms else ''} --rounds {args.rounds} --batch {args.batch}`",
        "",
        f"{names[0] if names else platform.machine()}{' with AVX512-BF16' if bf16 else ''}, one thread, CPU seconds of "
        f"each arm's process; load {os.getloadavg()[0]:.1f} when done. Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}.",
        "",
        f"{args.base}, rank {RANK} at the attention output and MLP down projection of the upper three quarters of the "
        f"layers, in every arm. {args.rounds} rounds of {args.batch} rows of {tasks}: {min(lengths)} to "
        f"{max(lengths)} tokens, median {statistics.median(lengths):.0f}. Tokens are those that are no padding. PEFT "
        "pads a batch to its longest row and computes all logits, as transformers' Trainer has it; grouped: the same "
        "rows sorted by length first, so its batches are others than those of the other arms and only the whole is "
        "compared.",
        "",
    ]
    for dtype, found in results.items():
        parts += [f"## {dtype}", "", *table(found)]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--before", help="checkout whose code runs as further arms")
    parser.add_argument("--data", help="folder of the public sets")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--batch", type=int, default=8, help="rows of a step; 8 is Trainer's default"
    )
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--arms", nargs="*", help="only arms whose name contains one of these")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/train_rate.md"))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.base, args.dtype, args.rows)
        return
    rows = encoded_rows(args)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for grouped in (False, True):
            path = folder / f"{grouped}.pkl"
            path.write_bytes(pickle.dumps(in_batches(rows, args.batch, grouped)))
        for dtype in args.dtypes:
            results[dtype] = measure(args, dtype, folder)
            text = report(args, results, [len(row["input_ids"]) for row in rows])
            Path(args.out).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
