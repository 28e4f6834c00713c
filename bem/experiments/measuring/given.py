"""What an adapted model gives to rows: its greedy answers, how likely it finds the references, its cache use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bem.adapters.attached import Attached
from bem.experiments.measuring.cache_use import CacheUse, cache_use, counted
from bem.training.answers import Decoded, greedy_decoded
from bem.training.data import Encoded
from bem.training.row_losses import answer_losses, losses_behind


@dataclass(frozen=True)
class Given:
    """What a model gave to one row, before anybody judged it."""

    ids: list[int]
    """Tokens of the greedy answer, without what follows its end."""
    loss: float
    """Of the reference answer and its end, in nats per token."""
    gate: float | None
    """Mean head-group gate while the answer begins; None: the adapter has none."""
    cache: CacheUse
    seconds: float
    """Share of the time its batch took."""


def give(
    attached: Any,
    tokenizer: Any,
    batch: Sequence[tuple[Encoded, Encoded]],
    max_new_tokens: int,
    pad_id: int,
) -> list[Given]:
    """Ask for a batch of rows at once.

    Args:
        attached: an adapter on its base, in eval mode.
        batch: of each row its prompt, and its prompt with the reference answer.
    """
    started = time.perf_counter()
    prompts = [prompt for prompt, _ in batch]
    wholes = [whole for _, whole in batch]
    decoded, uses = _generate(attached.model, tokenizer, prompts, max_new_tokens)
    found = None
    if isinstance(attached, Attached):  # what others compute may depend on how a text is cut
        found = losses_behind(attached, decoded, prompts, wholes, pad_id)
    losses, gates = found or answer_losses(attached, wholes, pad_id)
    seconds = (time.perf_counter() - started) / len(batch)
    return [
        Given(ids, loss, gate, use, seconds)
        for ids, loss, gate, use in zip(decoded.answers, losses, gates, uses, strict=True)
    ]


def batch_order(prompts: Sequence[Encoded], wholes: Sequence[Encoded]) -> list[int]:
    """Rows that will likely stop after as many tokens side by side, then by prompt length.

    A batch decodes until its last row has stopped; prompts of other lengths only cost padding.
    """

    def key(i: int) -> tuple[int, int]:
        return (len(wholes[i]) - wholes[i].prompt_length) // 8, len(prompts[i])

    return sorted(range(len(prompts)), key=key, reverse=True)


@torch.inference_mode()
def _generate(
    model: Any, tokenizer: Any, prompts: list[Encoded], max_new_tokens: int
) -> tuple[Decoded, list[CacheUse]]:
    """Greedy answers, and the cache use of each row."""
    with counted(model) as calls:
        decoded = greedy_decoded(model, tokenizer, prompts, max_new_tokens)
    lengths = [len(prompt) for prompt in prompts]
    return decoded, [
        cache_use(calls, length, len(answer))
        for length, answer in zip(lengths, decoded.answers, strict=True)
    ]
