"""The engine against what else there is: transformers' continuous batching, `generate`, PEFT's `adapter_names`.

    python benchmarks/engine.py                               # bem-tiny; writes benchmarks/results/engine.md
    python benchmarks/engine.py --base smollm2-135m --new 16  # the real base; engine_smollm2-135m.md

Every arm answers the same prompts, greedily and to the same length: a prefix in common, then text of their
own. All numbers are of one process on one thread. `--clock cpu` counts this process's CPU seconds: other
programs on the same core hardly disturb it. Rounds are interleaved; medians over rounds are reported.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import GenerationConfig  # noqa: E402
from transformers.generation import ContinuousBatchingConfig  # noqa: E402

import bem  # noqa: E402
from bem.engine.engine import Engine  # noqa: E402
from bem.engine.request import Request, Result  # noqa: E402
from bem.experts.expert import Update, from_updates  # noqa: E402
from bem.routing.mount import blank_expert  # noqa: E402

EXPERTS, RANK = 8, 8
SITES = ["o_proj", "down_proj"]
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass
class Numbers:
    """Of one arm at one number of concurrent requests, a value per round."""

    rate: list[float] = field(default_factory=list)
    """New tokens per second, prompts included in the time."""
    first: list[float] = field(default_factory=list)
    """Milliseconds to the first token, of each request."""
    between: list[float] = field(default_factory=list)
    """Milliseconds between two tokens."""


def prompts(n: int, shared: int, own: int, vocabulary: int, seed: int) -> list[list[int]]:
    """A prefix in common, then own to 2 own tokens."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randint, 3, vocabulary, generator=generator)
    prefix = draw((shared,)).tolist()
    lengths = torch.randint(own, 2 * own, (n,), generator=generator).tolist()
    return [prefix + draw((length,)).tolist() for length in lengths]


def routed(model: Any) -> Any:
    """Eight random experts and a router whose weights are random."""
    generator = torch.Generator().manual_seed(0)
    experts = []
    for number in range(EXPERTS):
        born = blank_expert(model, f"e{number}", RANK)
        updates = {
            site: Update(0.02 * torch.randn(u.u.shape, generator=generator), u.v)
            for site, u in born.updates.items()
        }
        experts.append(from_updates(born.name, updates, "random"))
    mounted = bem.mount(model, experts)
    with torch.no_grad():
        for weights in mounted.router.policy.parameters():
            weights += 0.3 * torch.randn(weights.shape, generator=generator)
    mounted.router.trained = True
    return mounted


# --- arms ---------------------------------------------------------------------------------------


def by_engine(engine: Engine, fields: Callable[[int], dict], asked: list, new: int, into: Numbers):
    """Ours, with a cold store: what is shared is shared within the round."""
    engine.store.clear()
    began, last = engine.clock(), {}
    for i, ids in enumerate(asked):
        engine.submit(Request(ids, max_new_tokens=new, ignore_eos=True, **fields(i)))
    results: list[Result] = []
    while engine.busy:
        running = {s.id: len(s.ids) for s in engine._arrived}
        results += engine.step().finished
        now = engine.clock()
        for sequence in engine._arrived:
            if len(sequence.ids) > max(running.get(sequence.id, 0), sequence.prompt):
                if sequence.id in last:
                    into.between.append(1000 * (now - last[sequence.id]))
                last[sequence.id] = now
    into.first += [1000 * (r.first_token_s or 0.0) for r in results]
    into.rate.append(len(asked) * new / (engine.clock() - began))
    return [list(r.token_ids) for r in sorted(results, key=lambda r: r.id)]


def by_generate(model: Any, clock: Callable, batched: bool, extra: Callable, asked, new, into):
    """Plain `generate`: left-padded in one batch, or one prompt after another."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    began, answers = clock(), []
    for group in [asked] if batched else [[ids] for ids in asked]:
        longest = max(map(len, group))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in group])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in group])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, **extra(len(group))
            )
        answers += out[:, longest:].tolist()
        into.first += [] if batched else [1000 * (clock() - began)]  # not before the whole answer
    into.rate.append(len(asked) * new / (clock() - began))
    return answers


def by_transformers(model: Any, clock: Callable, slots: int, asked, new, into):
    """transformers' continuous batching with its prefix sharing."""
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=new, pad_token_id=0, eos_token_id=-1
    )
    tokens = sum(map(len, asked)) + len(asked) * new
    config = ContinuousBatchingConfig(
        num_blocks=2 + tokens // 64 + 2 * len(asked), page_size=64, max_batch_tokens=512
    )
    began = clock()
    out = model.generate_batch(
        inputs=asked, generation_config=settings, continuous_batching_config=config,
        record_timestamps=True, warmup=False,
    )  # fmt: skip
    into.rate.append(len(asked) * new / (clock() - began))
    ordered = sorted(out.values(), key=lambda r: int(r.request_id.rpartition("_")[2]))
    for result in ordered:
        stamps = result.timestamps or []
        into.first += [1000 * (stamps[0] - result.created_time)] if stamps else []
        into.between += [1000 * (b - a) for a, b in itertools.pairwise(stamps)]
    return [list(r.generated_tokens) for r in ordered]


def with_peft(base: str) -> Any:
    """Eight LoRAs at the same sites."""
    config = LoraConfig(r=RANK, target_modules=SITES, task_type="CAUSAL_LM")
    model = get_peft_model(loaded(base)[0], config, adapter_name="e0")
    for number in range(1, EXPERTS):
        model.add_adapter(f"e{number}", config)
    return model.eval()


def loaded(name: str) -> tuple[Any, Any]:
    """(model, tokenizer) in float32, with ends of its own switched off."""
    model, tokenizer = bem.load_base(name)
    model.generation_config.eos_token_id = None
    return model.eval(), tokenizer


# --- what is reused -----------------------------------------------------------------------------


def reuse(base: str, options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(what, number, aim) of the chunk store."""
    model, tokenizer = loaded(base)
    mounted, clock = routed(model), CLOCKS[options.clock]
    new, rows = options.new, []
    engine = Engine(mounted, tokenizer, slots=8, clock=clock)
    conversation(engine, new)
    stats = engine.store.stats
    share = stats.reused / max(1, stats.reusable)
    rows.append(
        (
            "conversations of 4 turns that switch experts: reused / reusable",
            f"{share:.3f}",
            ">= 0.95",
        )
    )
    room = engine.max_tokens - 64
    (long,) = prompts(1, min(1024, room) - 16, 8, options.vocabulary, 5)
    times = [
        engine.generate([long], max_new_tokens=1, ignore_eos=True)[0].first_token_s
        for _ in range(6)
    ]
    warm = statistics.median(times[1:]) / times[0]
    rows.append(
        (f"first token, prefix of {len(long)} tokens: warm / cold", f"{warm:.3f}", "<= 0.15")
    )
    rows += releases(engine, mounted, options)
    rows += costs(engine, mounted, options)
    return rows


def releases(
    engine: Engine, mounted: Any, options: argparse.Namespace
) -> list[tuple[str, str, str]]:
    """Hits on the same prompts after one expert was changed, and after going back; for every expert that acted."""
    sets = range(options.sets)
    asked = [p for s in sets for p in prompts(8, 192, 32, options.vocabulary, s)]
    before, kept, back, stats = mounted.shadow(), [], [], engine.store.stats

    def hits(version: Any) -> float:
        mounted.adopt(version)
        stats.needed = stats.reused = 0
        results = engine.generate(asked, max_new_tokens=1, ignore_eos=True)
        acted.update(a.expert for r in results for a in r.actions)
        return stats.reused / stats.needed

    acted: set[str] = set()
    hits(before)
    warm = hits(before)
    for name in sorted(acted - {"base"}):
        release = changed(before, name)
        first = hits(release)
        kept.append(first / warm)
        back.append(hits(before) / warm)
        engine.store.purge(release.version.digest)
    of = f"(each of {len(kept)} experts that acted; mean, least)"
    return [
        (f"a release that changes one expert: hits kept {of}", _mean_least(kept), ">= 0.89"),
        (f"back to the one before: hits kept {of}", _mean_least(back), ">= 0.93"),
    ]


def _mean_least(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}, {min(values):.3f}" if values else "-"


def costs(engine: Engine, mounted: Any, options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Of different routes in one batch, and of deciding."""
    asked, rates, clock = prompts(8, 0, 48, options.vocabulary, 9), {}, engine.clock
    for several in (False, True) * 4:
        engine.store.clear()
        began = clock()
        engine.generate(
            [
                Request(
                    p,
                    max_new_tokens=options.new,
                    ignore_eos=True,
                    route=1 + several * (i % EXPERTS),
                )
                for i, p in enumerate(asked)
            ]
        )
        rates.setdefault(several, []).append(clock() - began)
    mixed = statistics.median(rates[False][1:]) / statistics.median(rates[True][1:])
    two = two_versions(engine, mounted, asked, options.new)
    router, spent = mounted.router, []
    decide = router.decide

    def timed(*args: Any) -> Any:
        began = clock()
        made = decide(*args)
        spent.append(clock() - began)
        return made

    router.decide = timed
    engine.store.clear()
    began = clock()
    engine.generate(asked, max_new_tokens=options.new, ignore_eos=True)
    share = sum(spent) / (clock() - began)
    del router.decide
    return [
        ("8 requests with 8 routes: throughput of a single route", f"{mixed:.3f}", ">= 0.9"),
        (
            "1 of 8 requests under another version: throughput of one version",
            f"{two:.3f}",
            ">= 0.9",
        ),
        ("the router's decisions: share of the time", f"{100 * share:.1f} %", "<= 2 %"),
    ]


def two_versions(engine: Engine, mounted: Any, asked: list, new: int) -> float:
    """Throughput with the last request under another version, as a share of that under one."""
    before, release, spent = mounted.shadow(), changed(mounted, "e0"), {}
    for several in (False, True) * 4:
        engine.store.clear()
        mounted.adopt(before)
        for ids in asked[:-1]:
            engine.submit(Request(ids, max_new_tokens=new, ignore_eos=True))
        began = engine.clock()
        engine.step()
        if several:
            mounted.adopt(release)
        engine.submit(Request(asked[-1], max_new_tokens=new, ignore_eos=True))
        while engine.busy:
            engine.step()
        spent.setdefault(several, []).append(engine.clock() - began)
    mounted.adopt(before)
    return statistics.median(spent[False][1:]) / statistics.median(spent[True][1:])


def conversation(engine: Engine, new: int) -> None:
    """Eight conversations side by side; every turn brings text of its own."""
    texts, turns = prompts(8, 64, 20, 300, 7), [[] for _ in range(8)]
    for turn in range(4):
        asks = [
            Request(ids, max_new_tokens=new, ignore_eos=True, turn_starts=tuple(t))
            for ids, t in zip(texts, turns, strict=True)
        ]
        for i, result in enumerate(engine.generate(asks)):
            turns[i].append(len(texts[i]) - 1)
            texts[i] = [*texts[i], *result.token_ids, *prompts(1, 0, 20, 300, 10 * turn + i)[0]]


def changed(mounted: Any, name: str) -> Any:
    """A shadow in which one expert has other weights."""
    shadow = mounted.shadow()
    number = [e.name for e in shadow.experts].index(name)
    with shadow.training("experts"), torch.no_grad():
        for stack in shadow.stacks.values():
            u, _ = stack.factors(number)
            u += 0.02 * torch.randn(u.shape, generator=torch.Generator().manual_seed(1))
    return shadow


# --- the run ------------------------------------------------------------------------------------


def arms(options: argparse.Namespace) -> dict[str, Callable]:
    """Name -> (asked, new, into) -> answers."""
    clock = CLOCKS[options.clock]
    plain, tokenizer = loaded(options.base)
    mounted = routed(loaded(options.base)[0])
    peft = with_peft(options.base)
    made = partial(Engine, tokenizer=tokenizer, slots=options.slots, clock=clock)
    bare, ours = made(plain), made(mounted)

    def nothing(_: int) -> dict:
        return {}

    return {
        "generate, one by one": partial(by_generate, plain, clock, False, nothing),
        "generate, one padded batch": partial(by_generate, plain, clock, True, nothing),
        "transformers continuous batching": partial(by_transformers, plain, clock, options.slots),
        "engine, bare base": partial(by_engine, bare, nothing),
        "PEFT adapter_names, 8 LoRAs": partial(
            by_generate, peft, clock, True, lambda n: {"adapter_names": [f"e{i % EXPERTS}" for i in range(n)]}
        ),
        "engine, 8 experts, routed": partial(by_engine, ours, nothing),
        "engine, 8 experts, a route per row": partial(by_engine, ours, lambda i: {"route": 1 + i % EXPERTS}),
        "engine, 8 experts, one route": partial(by_engine, ours, lambda i: {"route": 1}),
    }  # fmt: skip


def run(options: argparse.Namespace) -> dict[int, dict[str, Numbers]]:
    """Interleaved rounds of every arm."""
    runs, measured = arms(options), {}
    for n in options.concurrent:
        measured[n] = {name: Numbers() for name in runs}
        for round_ in range(options.rounds + 1):
            asked = prompts(n, options.shared, options.own, options.vocabulary, round_)
            answers = {}
            for name, arm in runs.items():
                into = Numbers() if not round_ else measured[n][name]  # the first one warms up
                answers[name] = arm(asked, options.new, into)
            same = [
                a == b
                for a, b in zip(
                    answers["generate, one by one"], answers["engine, bare base"], strict=True
                )
            ]
            print(
                f"{n} requests, round {round_}: {sum(same)} of {n} answers as generate's",
                flush=True,
            )
    return measured


def table(measured: dict[int, dict[str, Numbers]]) -> list[str]:
    """Markdown."""
    lines = [
        "| requests | arm | tokens/s | x CB | first token p50 / p95, ms | between p50 / p95, ms |",
        "|---|---|---|---|---|---|",
    ]
    for n, of in measured.items():
        base = statistics.median(of["transformers continuous batching"].rate)
        for name, numbers in of.items():
            rate = statistics.median(numbers.rate)
            lines.append(
                f"| {n} | {name} | {rate:.0f} | {rate / base:.2f} | {_pair(numbers.first)} | {_pair(numbers.between)} |"
            )
    return lines


def _pair(values: list[float]) -> str:
    if not values:
        return "-"
    ordered = sorted(values)
    return f"{statistics.median(ordered):.0f} / {ordered[int(0.95 * (len(ordered) - 1))]:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="bem-tiny")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--shared", type=int, default=128, help="tokens of the prefix in common")
    parser.add_argument(
        "--own", type=int, default=24, help="least tokens of each prompt's own text"
    )
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--sets", type=int, default=3, help="of 8 prompts each, for releases")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    measured = run(options)
    reused = ["| what | number | aim |", "|---|---|---|"]
    reused += [f"| {' | '.join(row)} |" for row in reuse(options.base, options)]
    name = "engine.md" if options.base == "bem-tiny" else f"engine_{options.base}.md"
    out = options.out or ROOT / "benchmarks" / "results" / name
    about = (
        f"{options.base}, float32, one thread, {options.clock} clock, {options.slots} slots; {options.shared} tokens in "
        f"common, {options.own} to {2 * options.own - 1} own, {options.new} new; medians of {options.rounds} rounds. "
        f"torch {torch.__version__}. Times of continuous batching are by the wall clock.\n"
    )
    out.write_text("\n".join(["# The engine", "", about, *table(measured), "", *reused, ""]))
    print(out.read_text())


if __name__ == "__main__":
    main()
