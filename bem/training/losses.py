"""Loss of answers: per row for measuring; training takes the model's own mean and weighs it."""

from __future__ import annotations

import torch
from torch import Tensor

from bem.training.data import IGNORED


def answer_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row's labelled tokens, in nats, and how many there are.

    Args:
        logits: [batch, length, vocabulary]; position t predicts token t + 1.
        labels: [batch, length], IGNORED outside answers, not shifted. `logits` may be shorter: then
            they belong to the last positions.
    Returns:
        (sum [batch] in float32, count [batch])
    """
    labels = labels[:, labels.shape[1] - logits.shape[1] :]
    targets = labels[:, 1:]
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return nll.sum(1), (targets != IGNORED).sum(1)


def labelled_tokens(labels: Tensor) -> int:
    """Tokens that a causal loss over `labels` counts (the first of a row has no prediction)."""
    return int((labels[:, 1:] != IGNORED).sum())
