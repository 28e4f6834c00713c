"""How long a prefill and a decoded token take, arm beside arm, and how much memory they need.

The arms take turns inside every round, each round in another order, so that whatever else the
machine does falls on all of them: only ratios within a round are worth comparing. On a CPU the
clock is the process's own CPU time on one thread, which other jobs disturb least; on CUDA it is
CUDA events. A prefill computes the logits of its last token only, as `generate` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bem.errors import MeasurementError
from bem.training.losses import arguments_of

Clock = Literal["cpu", "wall", "cuda"]
PHASES = ("prefill", "decode")
Samples = dict[str, dict[str, list[list[float]]]]
"""arm -> phase -> round -> samples in milliseconds."""
Pair = tuple[Sequence[float], Sequence[float]]
"""p50 of each round in milliseconds, of a candidate and of what it is judged against."""


@dataclass(frozen=True)
class Timings:
    """What was timed, in milliseconds."""

    latency_ms: dict[str, dict[str, list[float]]]
    """arm -> phase -> p50 of each round; round i of every arm ran beside round i of the others."""
    p50_ms: dict[str, dict[str, float]]
    """arm -> phase -> median over all samples of all rounds."""
    p95_ms: dict[str, dict[str, float]]
    clock: Clock
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    rounds: int
    threads: int


@dataclass(frozen=True)
class Budget:
    """How far timing may go on while an answer is open."""

    rounds: int
    """Most rounds in all."""
    seconds: float = inf
    """Beyond the rounds that are always timed, none begins after this time."""


@dataclass(frozen=True)
class Workload:
    """What is timed in a round."""

    prompt_tokens: int = 256
    new_tokens: int = 32
    batch_size: int = 1
    prefills: int = 2
    """Per round; the round's number is their median."""


def measure_latency(
    arms: Mapping[str, Any],
    *,
    rounds: int = 15,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    batch_size: int = 1,
    prefills: int = 2,
    clock: Clock | None = None,
    seed: int = 0,
    pairs: Sequence[tuple[str, str]] = (),
    undecided: Callable[[Sequence[Pair]], int] = lambda pairs: 0,
    budget: Budget | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Timings:
    """Time a prefill and token-by-token decoding with a cache for every arm.

    Args:
        arms: name -> attached adapter (or a plain model); all on one device. Make the models share
            their frozen weights with `with_shared_weights`.
        rounds: each gives one number per arm and phase.
        prompt_tokens, new_tokens: of random token ids (drawn from `seed`); what a token costs does
            not depend on which it is.
        prefills: prefills per round; the round's number is their median.
        clock: None: cuda on a GPU, else cpu.
        pairs: (candidate, opponent) names whose ratio is judged, in every phase.
        undecided: asked after `rounds` and then again: how many more rounds the pairs want; 0 ends.
        budget: of all rounds; None: `rounds` and no more.
        on_progress: called with (rounds done, rounds planned so far).
    Raises:
        MeasurementError: no arms, an unknown pair, or prompt and answer do not fit the context.
    """
    work = Workload(prompt_tokens, new_tokens, batch_size, prefills)
    models = {name: model_of(arm).eval() for name, arm in arms.items()}
    _check(models, work, pairs)
    device = next(iter(models.values())).device
    clock = clock or ("cuda" if device.type == "cuda" else "cpu")
    if clock == "cuda" and device.type != "cuda":
        raise MeasurementError(f"The clock cuda needs a GPU; the arms are on {device}.")
    stopwatch = _Stopwatch(models, work, clock, seed)
    more_rounds = lambda: undecided(stopwatch.pairs(pairs)) if pairs else 0  # noqa: E731
    with _threads(1 if clock == "cpu" else None) as threads, torch.inference_mode():
        stopwatch.run(rounds, more_rounds, budget or Budget(rounds), on_progress)
    return Timings(
        latency_ms=stopwatch.medians(),
        p50_ms=stopwatch.over_all(0.5),
        p95_ms=stopwatch.over_all(0.95),
        clock=clock,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        rounds=stopwatch.rounds,
        threads=threads,
    )


def _check(models: Mapping[str, Any], work: Workload, pairs: Sequence[tuple[str, str]]) -> None:
    if not models:
        raise MeasurementError("No arms to time.")
    if unknown := sorted({name for pair in pairs for name in pair} - models.keys()):
        raise MeasurementError(f"No arm {unknown[0]!r} to time. Arms: {', '.join(models)}.")
    context = getattr(next(iter(models.values())).config, "max_position_embeddings", None)
    if context and work.prompt_tokens + work.new_tokens > context:
        raise MeasurementError(
            f"{work.prompt_tokens} + {work.new_tokens} tokens exceed the model's context of {context}."
        )


@dataclass
class _Stopwatch:
    """Times rounds and keeps every sample."""

    models: Mapping[str, Any]
    work: Workload
    clock: Clock
    seed: int
    rounds: int = 0
    samples: Samples = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = next(iter(self.models.values()))
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.work.batch_size, self.work.prompt_tokens)
        ids = torch.randint(first.config.vocab_size, shape, generator=generator, device="cpu")
        self.ids = ids.to(first.device)
        self.samples = {name: {phase: [] for phase in PHASES} for name in self.models}

    def run(
        self,
        rounds: int,
        more_rounds: Callable[[], int],
        budget: Budget,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        """`rounds`, and then as many more as are asked for while the budget lasts."""
        started, goal = time.monotonic(), rounds
        for model in self.models.values():  # warm-up: allocator, lazily built buffers, kernels
            _round(model, self.ids, min(4, self.work.new_tokens), 1, self.clock)
        while self.rounds < goal:
            self.one_round()
            if on_progress:
                on_progress(self.rounds, goal)
            if self.rounds >= rounds and time.monotonic() - started >= budget.seconds:
                return
            if self.rounds == goal < budget.rounds:
                goal = min(goal + more_rounds(), budget.rounds)

    def one_round(self) -> None:
        """Every arm once; who begins changes from round to round."""
        names = list(self.models)
        turn = self.rounds % len(names)
        for name in names[turn:] + names[:turn]:
            taken = _round(
                self.models[name], self.ids, self.work.new_tokens, self.work.prefills, self.clock
            )
            for phase in PHASES:
                self.samples[name][phase].append(taken[phase])
        self.rounds += 1

    def medians(self) -> dict[str, dict[str, list[float]]]:
        """arm -> phase -> p50 of each round."""
        return {
            name: {p: [float(np.median(part)) for part in parts] for p, parts in row.items()}
            for name, row in self.samples.items()
        }

    def pairs(self, names: Sequence[tuple[str, str]]) -> list[Pair]:
        """Rounds of both sides of every pair, phase by phase."""
        p50 = self.medians()
        return [(p50[one][p], p50[other][p]) for one, other in names for p in PHASES]

    def over_all(self, q: float) -> dict[str, dict[str, float]]:
        """arm -> phase -> quantile over all samples of all rounds."""
        return {
            name: {p: float(np.quantile(np.concatenate(parts), q)) for p, parts in row.items()}
            for name, row in self.samples.items()
        }


def _round(
    model: Any, ids: Tensor, new_tokens: int, prefills: int, clock: Clock
) -> dict[str, list[float]]:
    """Samples in milliseconds: of each prefill, of each decoded token."""
    taken: dict[str, list[float]] = {phase: [] for phase in PHASES}
    watch, last = _WATCHES[clock], last_logits_only(model)
    output: Any = None
    for _ in range(prefills):
        output = None  # frees the cache of the prefill before
        output = watch(lambda: model(input_ids=ids, **last, use_cache=True), taken["prefill"])
    for _ in range(new_tokens):
        token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        output = watch(
            lambda t=token, c=cache: model(input_ids=t, past_key_values=c, use_cache=True),
            taken["decode"],
        )
    return taken


def model_of(arm: Any) -> Any:
    """The model of an attached adapter; a plain model is itself."""
    return arm if isinstance(arm, nn.Module) else arm.model


def last_logits_only(model: Any) -> dict[str, int]:
    """The argument that asks for the last token's logits alone, if the model knows it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in arguments_of(model) else {}


def _by_clock(now: Callable[[], float]) -> Callable[[Callable[[], Any], list[float]], Any]:
    def watch(call: Callable[[], Any], into: list[float]) -> Any:
        started = now()
        result = call()
        into.append((now() - started) * 1e3)
        return result

    return watch


def _by_events(call: Callable[[], Any], into: list[float]) -> Any:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = call()
    end.record()
    end.synchronize()
    into.append(start.elapsed_time(end))
    return result


_WATCHES: dict[str, Callable[[Callable[[], Any], list[float]], Any]] = {
    "cpu": _by_clock(time.process_time),
    "wall": _by_clock(time.perf_counter),
    "cuda": _by_events,
}


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Torch threads inside; None: as they are."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
