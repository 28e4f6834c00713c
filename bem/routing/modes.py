"""Modes that a stretch of code needs and gives back: seeded randomness, a model as it is in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """torch draws from `seed` inside; afterwards its generators go on where they were.

    Args:
        device: whose generator is seeded beside the CPU's.
    """
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in training (True) or in evaluation mode (False); afterwards each as it was.

    In evaluation mode there is no dropout, and rank masks are hard.
    """
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
