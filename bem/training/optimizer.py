"""What is trained, by which optimiser, at which rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from bem.config import TrainingConfig
from bem.errors import TrainingError

FINAL_LR = 0.1
"""Share of the peak learning rate that is left in the last step, and in every one after it."""


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of the step after `step` done ones: linear warm-up, then cosine to a tenth."""
    warmup = math.ceil(config.warmup * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - 1 - warmup)
    share = FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    return config.learning_rate * share


def trained(named: dict[str, nn.Parameter], label: str) -> dict[str, nn.Parameter]:
    """Those of an adapter's parameters that require a gradient.

    Raises:
        TrainingError: there are none, all are frozen, or one cannot have a gradient.
    """
    if not named:
        raise TrainingError(f"{label}: the adapter has no trainable parameters.")
    chosen = {name: p for name, p in named.items() if p.requires_grad}
    if not chosen:
        raise TrainingError(
            f"{label}: all {len(named)} parameters of the adapter are frozen, so nothing can be trained. Load it "
            "with bem.load(model, folder, trainable=True), or train what was mounted inside "
            "`with mounted.training('experts')`."
        )
    if odd := [name for name, p in chosen.items() if p.is_inference()]:
        raise TrainingError(
            f"{label}: {odd[0]} was made under torch.inference_mode(), which no gradient can pass: attach or "
            "load the adapter outside of it."
        )
    return chosen


def adamw(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW; vectors and scalars do not decay."""
    everything = list(parameters)
    matrices = [p for p in everything if p.ndim > 1]
    vectors = [p for p in everything if p.ndim <= 1]
    groups = ((matrices, config.weight_decay), (vectors, 0.0))
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in groups if group],
        lr=config.learning_rate,
    )
