"""How likely the reference answers are under an adapted model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bem.training.data import IGNORED, Encoded, collate
from bem.training.losses import answer_logits, answer_nll, answer_targets

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
    vocabulary = getattr(model.config, "vocab_size", None) or 1 << 16
    at_once = max(1, LOGITS_AT_ONCE // (longest * vocabulary))
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
