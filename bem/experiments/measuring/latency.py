"""How long a prefill and a decoded token take, arm beside arm, and how much memory they need.

The arms take turns inside every round, each round in another order, so that whatever else the
machine does falls on all of them: only ratios within a round are worth comparing. On a CPU the
clock is the process's own CPU time on one thread, which other jobs disturb least; on CUDA it is
CUDA events. A prefill computes the logits of its last token only, as `generate` does.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bem.errors import MeasurementError
from bem.training.losses import arguments_of

Clock = Literal["cpu", "wall", "cuda"]
PHASES = ("prefill", "decode")


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
        on_progress: called with (rounds done, rounds).
    Raises:
        MeasurementError: no arms, or prompt and answer do not fit the context.
    """
    if not arms:
        raise MeasurementError("No arms to time.")
    models = {name: _model(arm).eval() for name, arm in arms.items()}
    first = next(iter(models.values()))
    device = first.device
    clock = clock or ("cuda" if device.type == "cuda" else "cpu")
    if clock == "cuda" and device.type != "cuda":
        raise MeasurementError(f"The clock cuda needs a GPU; the arms are on {device}.")
    context = getattr(first.config, "max_position_embeddings", None)
    if context and prompt_tokens + new_tokens > context:
        raise MeasurementError(
            f"{prompt_tokens} + {new_tokens} tokens exceed the model's context of {context}."
        )
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, prompt_tokens)
    ids = torch.randint(first.config.vocab_size, shape, generator=generator).to(device)
    names = list(models)
    samples: dict[str, dict[str, list[list[float]]]] = {
        name: {phase: [] for phase in PHASES} for name in names
    }
    with _threads(1 if clock == "cpu" else None) as threads, torch.inference_mode():
        for name in names:  # warm-up: allocator, lazily built buffers, kernels
            _round(models[name], ids, min(4, new_tokens), 1, clock)
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                taken = _round(models[name], ids, new_tokens, prefills, clock)
                for phase in PHASES:
                    samples[name][phase].append(taken[phase])
            if on_progress:
                on_progress(number + 1, rounds)

    def over_all(q: float) -> dict[str, dict[str, float]]:
        return {
            name: {
                phase: float(np.quantile(np.concatenate(parts), q)) for phase, parts in row.items()
            }
            for name, row in samples.items()
        }

    return Timings(
        latency_ms={
            name: {
                phase: [float(np.median(part)) for part in parts] for phase, parts in row.items()
            }
            for name, row in samples.items()
        },
        p50_ms=over_all(0.5),
        p95_ms=over_all(0.95),
        clock=clock,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        rounds=rounds,
        threads=threads,
    )


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


def _model(arm: Any) -> Any:
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


# ------------------------------------------------------------------------------------------- memory


def peak_memory(
    arm: Any, *, prompt_tokens: int = 256, new_tokens: int = 16, batch_size: int = 1
) -> float:
    """Bytes needed at the worst moment of a prefill and some decoded tokens, weights included.

    On CUDA what the allocator reports. On a CPU the bytes of all live tensors, followed operation
    by operation: the same on every run and machine, unlike a process's resident size; scratch space
    inside an operation is not seen.
    """
    model = _model(arm).eval()
    device = model.device
    ids = torch.zeros((batch_size, prompt_tokens), dtype=torch.long, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _prefill_and_decode(model, ids, new_tokens)
        torch.cuda.synchronize(device)
        return weight_bytes(model) + torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        _prefill_and_decode(model, ids, new_tokens)
    return float(weight_bytes(model) + live.peak)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; shared ones count once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


@torch.no_grad()
def _prefill_and_decode(model: Any, ids: Tensor, new_tokens: int) -> None:
    step: dict[str, Any] = {"input_ids": ids, **last_logits_only(model)}
    for _ in range(new_tokens + 1):
        output = model(**step, use_cache=True)
        step = {
            "input_ids": output.logits[:, -1:].argmax(-1),
            "past_key_values": output.past_key_values,
        }
        del output  # or its logits would live through the next step


class _LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make until they are freed; `peak`: most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._known.add(tensor.untyped_storage())  # was there before: not ours to count
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, size)
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
