"""How likely the reference answers are under an adapted model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bem.training.answers import Decoded
from bem.training.data import IGNORED, Encoded, collate
from bem.training.losses import answer_logits, answer_nll, answer_targets, arguments_of

LOGITS_AT_ONCE = 1 << 27
"""Largest number of logits of one forward pass (half a GiB)."""


@torch.inference_mode()
def answer_losses(
    attached: Any, rows: Sequence[Encoded], pad_id: int
) -> tuple[list[float], list[float | None]]:
    """Mean negative log-likelihood of each row's last answer and its end, in nats per token; and the
    mean gate at the answer's first token, if there are gates."""
    model = attached.model
    longest = max(len(row) for row in rows)
    at_once = max(1, LOGITS_AT_ONCE // (longest * _vocabulary(model)))
    losses: list[float] = []
    gates: list[float | None] = []
    for i in range(0, len(rows), at_once):
        batch = collate(rows[i : i + at_once], pad_id)
        for row, labels in zip(rows[i : i + at_once], batch["labels"], strict=True):
            labels[: len(labels) - (len(row) - row.prompt_length)] = IGNORED  # earlier turns
        batch = {key: value.to(model.device) for key, value in batch.items()}
        sums, counts = answer_nll(answer_logits(model, batch), answer_targets(batch["labels"]))
        losses += (sums / counts).tolist()
        magnitude = attached.gate_magnitude() if hasattr(attached, "gate_magnitude") else None
        width = batch["labels"].shape[1]
        for r, row in enumerate(rows[i : i + at_once]):
            first = width - len(row) + row.prompt_length
            gates.append(None if magnitude is None else float(magnitude[r, first]))
    return losses, gates


@torch.inference_mode()
def losses_behind(
    attached: Any,
    decoded: Decoded,
    prompts: Sequence[Encoded],
    rows: Sequence[Encoded],
    pad_id: int,
) -> tuple[list[float], list[float | None]] | None:
    """What `answer_losses` gives, without reading the prompts again: the reference answers go on where they were
    read. The cache is cropped for it.

    Args:
        prompts: what `decoded` answers.
        rows: with their reference answers.
    Returns:
        None: a row is cut elsewhere than its prompt, the cache does not hold them, or the logits are too many.
    """
    model, columns = attached.model, decoded.prompts["input_ids"].shape[1]
    width = max(len(row) - row.prompt_length for row in rows) + 1
    goes_on = all(map(_begins_with, rows, prompts)) and _can_crop(decoded.cache, columns)
    if not goes_on or len(rows) * width * _vocabulary(model) > LOGITS_AT_ONCE:
        return None
    decoded.cache.crop(columns - 1 - decoded.cache.get_seq_length())
    batch = {name: value.to(model.device) for name, value in _behind(rows, pad_id).items()}
    before = decoded.prompts["attention_mask"][:, :-1]
    seen = torch.cat([before, batch["attention_mask"]], 1)
    given = {name: batch[name] for name in ("input_ids", "turn_starts", "route") if name in batch}
    if "position_ids" in arguments_of(model):
        given["position_ids"] = batch["position_ids"]
    logits = model(**given, attention_mask=seen, past_key_values=decoded.cache).logits
    sums, counts = answer_nll(logits[:, :-1], batch["labels"][:, 1:])
    magnitude = attached.gate_magnitude() if hasattr(attached, "gate_magnitude") else None
    gates: list[float | None] = [None] * len(rows)
    if magnitude is not None:
        gates = magnitude[:, 1].tolist()
    return (sums / counts).tolist(), gates


def _behind(rows: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """Each row from the last token of its prompt on, padded on the right: nothing looks there."""
    parts = [
        Encoded(row.input_ids[at:], row.labels[at:], 1, row.turn_starts[at:], (), row.route[at:])
        for row in rows
        for at in [row.prompt_length - 1]
    ]
    batch = collate(parts, pad_id, "right")
    first = torch.tensor([[row.prompt_length - 1] for row in rows])
    batch["position_ids"] = first + batch["position_ids"]
    return batch


def _begins_with(row: Encoded, prompt: Encoded) -> bool:
    """Is the prompt read as the beginning of the row?"""
    n = row.prompt_length
    told = (row.relevance, row.vision) == (prompt.relevance, prompt.vision)
    same = told and row.input_ids[:n] == prompt.input_ids
    turns = row.turn_starts[: n - 1] == prompt.turn_starts[: n - 1]
    return n == len(prompt) and same and turns and row.route[: n - 1] == prompt.route[: n - 1]


def _can_crop(cache: Any, columns: int) -> bool:
    """To less than what was read of these prompts; a window that slides has forgotten its beginning."""
    layers = getattr(cache, "layers", None) or []
    held = bool(layers) and cache.get_seq_length() >= columns > 1
    return held and not any(layer.is_sliding for layer in layers)


def _vocabulary(model: Any) -> int:
    return getattr(model.config, "vocab_size", None) or 1 << 16
