"""Likelihood of answers, with logits computed only where answers are.

columns -> answer_logits [batch, columns, vocabulary], answer_targets [batch, columns] -> answer_nll
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bem.training.data import IGNORED


def answer_nll(
    logits: Float[Tensor, "batch columns vocabulary"], targets: Int[Tensor, "batch columns"]
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Negative log-likelihood of each row's answer tokens, in nats, and how many there are.

    Args:
        logits, targets: of `answer_logits` and `answer_targets`; targets: the token that a column
            predicts, IGNORED where that is no answer.
    Returns:
        (sum in float32, count)
    """
    nll = token_nll(logits, targets)
    return nll.sum(1), (targets != IGNORED).sum(1)


def token_nll(
    logits: Float[Tensor, "batch columns vocabulary"], targets: Int[Tensor, "batch columns"]
) -> Float[Tensor, "batch columns"]:
    """Negative log-likelihood of each target in nats, float32; 0 where it is IGNORED.

    The softmax is taken at answers alone: over a large vocabulary it costs as much as a layer.
    """
    counted = targets != IGNORED
    nll = F.cross_entropy(logits[counted].float(), targets[counted], reduction="none")
    return torch.zeros(targets.shape, device=nll.device).masked_scatter(counted, nll)


def labelled_tokens(labels: Int[Tensor, "batch length"]) -> int:
    """Tokens that a causal loss over `labels` counts (the first of a row has no prediction)."""
    return int((labels[:, 1:] != IGNORED).sum())


def answer_columns(labels: Int[Tensor, "batch length"]) -> Int[Tensor, " columns"]:
    """Positions that predict an answer token of any row, in order."""
    return (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]


def answer_targets(labels: Int[Tensor, "batch length"]) -> Int[Tensor, "batch columns"]:
    """The token that each of `answer_columns` predicts; IGNORED where that is no answer of the row."""
    return labels[:, answer_columns(labels) + 1]


def answer_logits(
    model: Any, batch: Mapping[str, Tensor]
) -> Float[Tensor, "batch columns vocabulary"]:
    """Logits of a batch at `answer_columns` of its labels.

    The head and the loss over a vocabulary cost as much as several layers; prompts need neither.
    Turn starts are handed over as the labels would give them.
    """
    columns = answer_columns(batch["labels"])
    names = ("input_ids", "attention_mask", "turn_starts", "evidence", "vision", "route")
    arguments = {name: batch[name] for name in names if name in batch}
    accepted = arguments_of(model)
    if "position_ids" in accepted:
        arguments["position_ids"] = batch["position_ids"]
    if "logits_to_keep" not in accepted:
        return model(**arguments, use_cache=False).logits[:, columns]
    return model(**arguments, logits_to_keep=columns, use_cache=False).logits


def arguments_of(model: Any) -> set[str]:
    """Names that the innermost model's forward takes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(type(inner).forward).parameters)
