"""How much memory an adapter adds: its parameters and buffers, and what it holds while it works.

The base's own weights, keys, values and activations are no part of it: they would drown what tells
two arms apart. So the same work is followed on the arm and on the bare base, and subtracted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bem.adapters.quantised import plain_tensors
from bem.experiments.measuring.latency import last_logits_only, model_of


def added_memory(
    arms: Mapping[str, Any],
    base: nn.Module,
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 16,
    batch_size: int = 1,
) -> dict[str, float]:
    """Bytes that each arm needs above the bare base at the worst moment of two sequences, one after the
    other: a prefill and some decoded tokens each.

    Two, because what an adapter makes while it decodes and keeps lies beside the next prefill.

    Args:
        arms: name -> attached adapter. Freshly attached: what an adapter makes in its first pass and
            keeps is counted in that pass.
        base: the bare base. Weights that an arm shares with it are not counted.
    Returns:
        Parameters and buffers that the base does not have, plus the difference between the two
        peaks; below 0 where an arm holds less than the base does (one that keeps no cache).
    """
    work = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size}
    bare = peak_activations(base, **work)
    owned = _storages(base)
    return {
        name: float(
            sum(size for at, size in _storages(model_of(arm)).items() if at not in owned)
            + peak_activations(arm, **work)
            - bare
        )
        for name, arm in arms.items()
    }


def whole_memory(model: Any, **work: int) -> float:
    """Bytes that a model needs in all at that moment, weights included.

    Args:
        work: as of `added_memory`.
    """
    return float(weight_bytes(model_of(model)) + peak_activations(model, **work))


def peak_activations(
    arm: Any, *, prompt_tokens: int = 256, new_tokens: int = 16, batch_size: int = 1
) -> int:
    """Bytes beyond the weights at the worst moment of two sequences, one after the other, a prefill and
    some decoded tokens each: activations, keys and values, control.

    On CUDA what the allocator reports. On a CPU the bytes of all live tensors, followed operation
    by operation: the same on every run and machine, unlike a process's resident size; scratch space
    inside an operation is not seen.
    """
    model = model_of(arm).eval()
    device = model.device
    ids = torch.zeros((batch_size, prompt_tokens), dtype=torch.long, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        two_sequences(model, ids, new_tokens)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        two_sequences(model, ids, new_tokens)
    return live.peak


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; shared ones count once."""
    return sum(_storages(model).values())


def _storages(model: nn.Module) -> dict[int, int]:
    """Address -> bytes of every storage behind parameters and buffers: of quantised ones, what they consist of."""
    held = (
        tensor.untyped_storage()
        for module in model.modules()
        for each in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        for _, tensor in plain_tensors("", each, module)
    )
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def two_sequences(model: Any, ids: Tensor, new_tokens: int) -> None:
    """What is followed: the second begins when the first one's cache is gone."""
    for _ in range(2):
        _prefill_and_decode(model, ids, new_tokens)


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
