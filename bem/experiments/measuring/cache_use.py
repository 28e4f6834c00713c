"""How much of the keys and values that decoding needs was found in the cache, request by request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One forward pass over a batch."""

    held: int
    """Columns in the cache when it began, by the cache's own length."""
    handed_in: int
    """Columns that it computed."""


@dataclass(frozen=True)
class CacheUse:
    """Keys and values at the decode steps of one request."""

    hits: float
    """Entries that were in the cache and were not computed again."""
    needed: float
    """Entries of all tokens before the one being decoded."""


def cache_use(calls: Sequence[Call], prompt: int, answer: int) -> CacheUse:
    """Sum over the decode steps of one row; the first call is the prefill, which needs nothing.

    Args:
        calls: all passes of the batch that the row is in, padded on the left.
        prompt, answer: tokens of the row.
    """
    hits = needed = 0
    for step, call in enumerate(calls[1 : answer + 1], 1):
        before = prompt + step - 1  # tokens of this row before the one whose successor is decoded
        padding = calls[0].handed_in - prompt
        cached = max(0, call.held - padding)  # the first columns are padding
        fresh = call.handed_in - 1  # beside the new token: computed again
        needed += before
        hits += max(0, min(cached, before - fresh))
    return CacheUse(hits, needed)


@contextmanager
def counted(model: Any) -> Iterator[list[Call]]:
    """Every forward pass of the base model inside, in order."""
    calls: list[Call] = []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def note(module: Any, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        calls.append(Call(0 if cache is None else int(cache.get_seq_length()), ids.shape[1]))

    handle = inner.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
