"""What adapters cost at run time: base, PEFT LoRA / LoKr / X-LoRA and every BEM variant, side by side.

    python benchmarks/overhead.py                       # writes benchmarks/results/overhead.md and .json
    python benchmarks/overhead.py --rounds 0.2          # a fifth of the rounds
    python benchmarks/overhead.py --longest 1           # no further rounds for what is open then
    python benchmarks/overhead.py --device cuda         # bfloat16, CUDA events

All arms live in one process and share the base's weights. In every round each arm runs once, in an
order drawn anew; an arm's ratio is the median over rounds of its time / the reference's time in the
same round, so that drift of the machine cancels. A short warm-up comes before the rounds of a task.
Arms whose aim is open after these rounds go on, with their references, to at most `--longest` times as
many.

The CPU clock counts the CPU seconds of this process on one thread: other programs on the same cores
hardly disturb it. `--clock wall` needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

RANK = 16
EXPERTS = 3  # of X-LoRA, and of our router
SITES = ["o_proj", "down_proj"]
PROMPT, DECODED = 128, 64  # tokens; 64 = one chunk, so that every decode contains one new control
LORA, XLORA, ROUTER = "PEFT LoRA", "PEFT X-LoRA, 3 experts", "BEM router, 3 experts"
LEAST_ROUNDS, LOOK = (
    6,
    5,
)  # below so many an aim is open; every so many what is open is looked at anew
Timer = Callable[[Callable[[], Any]], float]  # runs a function, returns milliseconds
Run = Callable[["Arm", Timer, bool], float]  # what an arm does in a round; True: to warm up only


@dataclass(frozen=True)
class Arm:
    """One model to measure."""

    name: str
    model: Any
    note: str
    parameters: int  # that train

    @property
    def cached(self) -> bool:
        """X-LoRA cannot use a KV cache."""
        return self.name != XLORA


@dataclass(frozen=True)
class Task:
    """What every arm does once per round: `start(arms)` gives `run(arm, timer, warm)` -> milliseconds."""

    name: str
    rounds: int
    slow_rounds: int  # rounds in which X-LoRA takes part
    start: Callable[[list[Arm]], Run]
    train: bool = False


# --- arms -----------------------------------------------------------------------------------------


def make_arms(layers: int, device: str) -> Iterator[Arm]:
    """Every arm on one and the same set of base weights."""
    from peft import LoKrConfig, LoraConfig, XLoraConfig, get_peft_model

    import bem
    from bem.adapters.budget import match_rank, price
    from bem.config import AdapterConfig

    config = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=layers,
        intermediate_size=1408,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=8000,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    first = LlamaForCausalLM(config).to(device, dtype)

    def base() -> Any:
        model = LlamaForCausalLM(config).to(device, dtype)
        for own, shared in zip(model.parameters(), first.parameters(), strict=True):
            own.data = shared.data
        return model

    def arm(name: str, model: Any, note: str) -> Arm:
        fill_zeros(model)
        return Arm(name, model, note, sum(p.numel() for p in model.parameters() if p.requires_grad))

    lora = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=SITES, task_type="CAUSAL_LM"
    )
    lokr = LoKrConfig(r=RANK, alpha=2 * RANK, target_modules=SITES, task_type="CAUSAL_LM")
    yield arm("base", base(), "trains in full")
    yield arm(LORA, get_peft_model(base(), lora), f"r={RANK}")
    yield arm("PEFT LoKr", get_peft_model(base(), lokr), f"r={RANK}")
    with tempfile.TemporaryDirectory() as folder:
        experts = get_peft_model(base(), lora, adapter_name="0")
        for i in range(1, EXPERTS):
            experts.add_adapter(str(i), lora)
        fill_zeros(experts)
        experts.save_pretrained(folder)
        mixture = base()
        mixture.config.use_cache = False
        adapters = {str(i): str(Path(folder) / str(i)) for i in range(EXPERTS)}
        settings = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=512, layerwise_scalings=True, adapters=adapters
        )
        yield arm(XLORA, get_peft_model(mixture, settings), f"r={RANK} each; no KV cache")
        # the first adapter lies in the folder itself, the others in folders of their own
        folders = [path.parent for path in sorted(Path(folder).rglob("adapter_config.json"))]
        mounted = bem.mount(base(), folders, router_layer=0)
        mounted.router.trained = True  # its policy decides, by its first weights
        yield arm(ROUTER, mounted.model, f"r={RANK} each; router included")

    def settings_of(variant: str, rank: int = RANK) -> AdapterConfig:
        return AdapterConfig(variant=variant, rank=rank, router_layer=0)  # type: ignore[arg-type]

    plain = base()
    static = price(plain, settings_of("s0"))
    terms = 1
    while price(plain, settings_of("v3", terms + 1)).flops_per_token <= static.flops_per_token:
        terms += 1
    configs = {
        "BEM s0": settings_of("s0"),
        "BEM pt1": settings_of("pt1"),
        "BEM v1": settings_of("v1"),
        "BEM v1, LoRA's parameters": match_rank(plain, settings_of("v1"), static),
        "BEM v2": settings_of("v2"),
        "BEM v3": settings_of("v3", terms),
        "BEM v4": settings_of("v4"),
    }
    for name, chosen in configs.items():
        attached = bem.attach(base(), chosen)
        share = attached.price().flops_per_token / static.flops_per_token
        size = f"{chosen.rank} term(s)" if chosen.variant == "v3" else f"r={chosen.rank}"
        if name != "BEM v1" and chosen == configs["BEM v1"]:
            size += ", the same as BEM v1: what differs between the two is noise"
        yield arm(name, attached.model, f"{size}; {share:.2f} of the LoRA's FLOPs")


def fill_zeros(model: nn.Module) -> None:
    """Adapters start as zero: give them values, so that nothing is special."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            noise = torch.empty(parameter.shape).normal_(0, 1e-3, generator=generator)
            parameter.data.copy_(noise)


# --- tasks ----------------------------------------------------------------------------------------


def make_tasks(device: str, scale: float) -> list[Task]:
    """The tasks with their rounds; `scale` multiplies the rounds."""
    generator = torch.Generator().manual_seed(7)

    def tokens(batch: int, length: int) -> torch.Tensor:
        return torch.randint(3, 8000, (batch, length), generator=generator).to(device)

    def prefill(arms: list[Arm]) -> Run:
        x = tokens(1, 512)

        @torch.inference_mode()
        def run(arm: Arm, timed: Timer, warm: bool) -> float:
            return timed(lambda: arm.model(input_ids=x, use_cache=arm.cached, logits_to_keep=1))

        return run

    def generate(batch: int, arms: list[Arm]) -> Run:
        x = tokens(batch, PROMPT)

        def run(arm: Arm, timed: Timer, warm: bool) -> float:
            steps = DECODED if arm.cached and not warm else 2

            def write(n: int) -> None:
                out = arm.model.generate(
                    input_ids=x,
                    attention_mask=torch.ones_like(x),
                    max_new_tokens=n,
                    min_new_tokens=n,
                    do_sample=False,
                    use_cache=arm.cached,
                    pad_token_id=0,
                )
                assert out.shape[1] == PROMPT + n

            one = timed(lambda: write(1))
            return (timed(lambda: write(1 + steps)) - one) / steps

        return run

    def loop(batch: int, arms: list[Arm]) -> Run:
        x = tokens(batch, PROMPT)
        with torch.inference_mode():
            caches = {
                arm.name: arm.model(input_ids=x, use_cache=True).past_key_values
                for arm in arms
                if arm.cached
            }

        @torch.inference_mode()
        def run(arm: Arm, timed: Timer, warm: bool) -> float:
            cache = caches[arm.name]
            return timed(
                lambda: arm.model(input_ids=x[:, -1:], past_key_values=cache, use_cache=True)
            )

        return run

    def train(arms: list[Arm]) -> Run:
        x = tokens(8, 256)

        def run(arm: Arm, timed: Timer, warm: bool) -> float:
            ids = x[:1] if warm else x

            def step() -> None:
                arm.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

            ms = timed(step)
            arm.model.zero_grad(set_to_none=True)
            return ms

        return run

    def n(rounds: float) -> int:
        return max(1, round(rounds * scale))

    return [
        Task("prefill 512", n(30), n(5), prefill),
        Task("decode b1, loop", n(200), 0, partial(loop, 1)),
        Task("decode b8, loop", n(100), 0, partial(loop, 8)),
        Task("decode b1, generate", n(8), 1, partial(generate, 1)),
        Task("train 8x256", n(7), 1, train, train=True),
        Task("decode b8, generate", n(4), 1, partial(generate, 8)),
    ]


def make_timer(clock: str, device: str) -> Timer:
    """CPU seconds, wall seconds, or the time between two CUDA events."""
    if device == "cuda":

        def cuda(fn: Callable[[], Any]) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            fn()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

        return cuda
    now = time.process_time if clock == "cpu" else time.perf_counter

    def timed(fn: Callable[[], Any]) -> float:
        begin = now()
        fn()
        return (now() - begin) * 1e3

    return timed


def measure(
    task: Task, arms: list[Arm], timed: Timer, longest: float
) -> dict[str, dict[int, float]]:
    """Milliseconds of every arm in every round."""
    rng = np.random.default_rng(0)
    for arm in arms:
        arm.model.train(task.train)
    arms = [arm for arm in arms if not (task.train and arm.name == ROUTER)]  # it learns otherwise
    run = task.start(arms)
    found: dict[str, dict[int, float]] = {arm.name: {} for arm in arms}
    for number in range(-2, round(task.rounds * longest)):  # two rounds warm up
        if number >= task.rounds and (number - task.rounds) % LOOK == 0:
            undecided = {name for name, _, _, state in judged(task.name, found) if state == "open"}
            if not undecided:
                break
            arms = [arm for arm in arms if arm.name in undecided or arm.name in ("base", LORA)]
        able = [arm for arm in arms if arm.cached or 0 <= number < task.slow_rounds]
        for i in rng.permutation(len(able)):
            ms = run(able[i], timed, number < 0)
            if number >= 0:
                found[able[i].name][number] = ms
    return found


# --- report ---------------------------------------------------------------------------------------


def ratios(mine: dict[int, float], reference: dict[int, float]) -> list[float]:
    """Sorted ratios of the rounds that both took part in."""
    return sorted(mine[i] / reference[i] for i in mine if i in reference)


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the median ratio: percentile bootstrap over rounds."""
    drawn = np.random.default_rng(0).choice(values, (1000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def shown(values: list[float]) -> str:
    """Median of ratios, its interval and their range."""
    if not values:
        return "-"
    low, high = interval(values)
    middle = f"**{statistics.median(values):.3f}** [{low:.3f}, {high:.3f}]"
    return f"{middle} ({values[0]:.2f} to {values[-1]:.2f})"


def table(task: Task, found: dict[str, dict[int, float]]) -> list[str]:
    """One Markdown table."""
    rows = [
        f"### {task.name}",
        "",
        f"| arm | median ms{' per token' if 'decode' in task.name else ''} | / base [95 %] (range) "
        "| / PEFT LoRA [95 %] (range) | n |",
        "|---|---|---|---|---|",
    ]
    for name, mine in found.items():
        if mine:
            to_base, to_lora = ratios(mine, found["base"]), ratios(mine, found.get(LORA, {}))
            ms = statistics.median(mine.values())
            rows.append(
                f"| {name} | {ms:.2f} | {shown(to_base)} | {shown(to_lora)} | {len(mine)} |"
            )
    return [*rows, ""]


def limits(task: str) -> list[tuple[str, float]]:
    """(reference, largest ratio to it) of a task."""
    if "train" in task:
        return [(LORA, 1.0)]
    return [("base", 1.03)] if "prefill" in task else [("base", 1.05), (LORA, 1.0)]


def judged(task: str, found: dict[str, dict[int, float]]) -> Iterator[tuple[str, str, float, str]]:
    """(arm, reference, median ratio, met | missed | open) of each of our arms and aims."""
    for reference, limit in limits(task):
        for name, mine in found.items():
            values = ratios(mine, found.get(reference, {}))
            if not name.startswith("BEM") or not values:
                continue
            low, high = interval(values)
            clear = len(values) >= LEAST_ROUNDS and not low <= limit < high
            state = "open" if not clear else "met" if high <= limit else "missed"
            yield name, reference, statistics.median(values), state


def aims(results: dict[str, dict[str, dict[int, float]]]) -> list[str]:
    """What we aim for and who meets it; open: the interval holds the limit, or too few rounds."""
    rows = ["| aim | met | missed | open |", "|---|---|---|---|"]
    for task, found in results.items():
        states = list(judged(task, found))
        for reference, limit in limits(task):
            cells = [
                "; ".join(
                    f"{name[4:]} {ratio:.3f}"
                    for name, to, ratio, state in states
                    if (to, state) == (reference, wanted)
                )
                for wanted in ("met", "missed", "open")
            ]
            rows.append(
                f"| {task} <= {limit} x {reference} | " + " | ".join(c or "-" for c in cells) + " |"
            )
    return rows


def machine(args: argparse.Namespace) -> list[str]:
    """How and where this was measured."""
    import peft
    import transformers

    if args.device == "cuda":
        kind = f"{torch.cuda.get_device_name()}, bfloat16, CUDA events"
    else:
        model = next(
            (row.split(":", 1)[1].strip() for row in cpuinfo() if row.startswith("model name")),
            platform.machine(),
        )
        clock = "CPU seconds of the process" if args.clock == "cpu" else "wall clock"
        kind = f"{model}, 1 thread, float32, {clock}; load {os.getloadavg()[0]:.1f} when done"
    return [
        f"`{' '.join(['python benchmarks/overhead.py', *sys.argv[1:]])}`",
        "",
        f"{kind}. Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}.",
    ]


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def report(
    args: argparse.Namespace, arms: list[Arm], results: dict[str, Any], tasks: list[Task]
) -> str:
    base = next(arm for arm in arms if arm.name == "base")
    rows = [
        "# Run-time overhead of adapters",
        "",
        *machine(args),
        "",
        f"Llama architecture, random weights, hidden 512, {args.layers} layers, MLP 1408, 8 heads, vocabulary 8000: "
        f"{base.parameters / 1e6:.1f} M parameters. Rank {RANK} at o_proj and down_proj of all layers "
        "(`router_layer=0`, so that the controller reads the embeddings and BEM adapts the same layers as PEFT). "
        "pt1 and v2 adapt o_proj alone and v3 down_proj alone, by definition; v4 works on the residual stream.",
        f"`generate` is (T({DECODED + 1}) - T(1)) / {DECODED} after a prompt of {PROMPT} tokens: the {DECODED} steps contain "
        "the start of one chunk. `loop` calls the model itself, the arms taking turns token by token: a round is a token. "
        "Prefill computes the logits of the last token only, as `generate` does. X-LoRA decodes 2 tokens, without cache.",
        "",
        "| arm | size | trainable parameters |",
        "|---|---|---|",
        *(f"| {arm.name} | {arm.note} | {arm.parameters:,} |" for arm in arms),
        "",
        "## Aims",
        "",
        *aims(results),
        "",
        "## Times",
        "",
    ]
    for task in tasks:
        if task.name in results:
            rows += table(task, results[task.name])
    missing = [task.name for task in tasks if task.name not in results]
    if missing:
        rows += [f"Stopped before: {'; '.join(missing)}.", ""]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rounds", type=float, default=1.0, help="multiplies the rounds of every task"
    )
    parser.add_argument(
        "--longest",
        type=float,
        default=5.0,
        help="times as many rounds at most, while an aim is open",
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--arms", nargs="*", help="only arms whose name contains one of these; base always"
    )
    parser.add_argument("--tasks", nargs="*", help="only tasks whose name contains one of these")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "overhead.md")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    arms = [
        arm
        for arm in make_arms(args.layers, args.device)
        if not args.arms or arm.name == "base" or any(part in arm.name for part in args.arms)
    ]
    tasks = [
        task
        for task in make_tasks(args.device, args.rounds)
        if not args.tasks or any(part in task.name for part in args.tasks)
    ]
    timed = make_timer(args.clock, args.device)
    results: dict[str, dict[str, dict[int, float]]] = {}
    for task in tasks:
        results[task.name] = measure(task, arms, timed, args.longest)
        print("\n".join(table(task, results[task.name])), flush=True)
        args.out.write_text(report(args, arms, results, tasks))  # a partial result survives a kill
        args.out.with_suffix(".json").write_text(
            json.dumps({"arms": {a.name: a.note for a in arms}, "ms": results})
        )
    print("\n".join(aims(results)))


if __name__ == "__main__":
    main()
