"""Likelihood of answers, with logits computed only where answers are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bem.training.data import IGNORED


def answer_nll(
    logits: Float[Tensor, "batch positions vocabulary"], labels: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Negative log-likelihood of each row's labelled tokens, in nats, and how many there are.

    Args:
        logits: position t predicts token t + 1. They may be fewer than the labels: then they belong
            to the last positions.
        labels: IGNORED outside answers, not shifted.
    Returns:
        (sum in float32, count)
    """
    labels = labels[:, labels.shape[1] - logits.shape[1] :]
    targets = labels[:, 1:]
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return nll.sum(1), (targets != IGNORED).sum(1)


def labelled_tokens(labels: Int[Tensor, "batch length"]) -> int:
    """Tokens that a causal loss over `labels` counts (the first of a row has no prediction)."""
    return int((labels[:, 1:] != IGNORED).sum())


def answer_logits(
    model: Any, batch: Mapping[str, Tensor]
) -> Float[Tensor, "batch positions vocabulary"]:
    """Logits of the last positions of a left-padded batch, from the one before the first label on.

    The head and the loss over a vocabulary cost as much as several layers; prompts need neither.
    Turn starts are handed over as the labels would give them.
    """
    labels = batch["labels"]
    first = int((labels != IGNORED).any(0).to(torch.int8).argmax())
    names = ("input_ids", "attention_mask", "turn_starts", "evidence", "route")
    arguments = {name: batch[name] for name in names if name in batch}
    accepted = arguments_of(model)
    if "position_ids" in accepted:
        arguments["position_ids"] = batch["position_ids"]
    last = {}
    if "logits_to_keep" in accepted:
        last["logits_to_keep"] = labels.shape[1] - max(0, first - 1)
    return model(**arguments, **last, use_cache=False).logits


def arguments_of(model: Any) -> set[str]:
    """Names that the innermost model's forward takes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(type(inner).forward).parameters)
