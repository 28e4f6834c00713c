"""What the returns of episodes are measured against: other answers to the same question, and a value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from bem.errors import Diverged
from bem.routing.modes import seeded
from bem.routing.policy import Net
from bem.routing.router import AgenticRouter


def leave_one_out(returns: NDArray[np.float64], samples: int) -> NDArray[np.float64]:
    """What the other episodes of the same conversation returned on average (episodes,); 0 if there are none.

    Args:
        returns: (episodes,), `samples` in a row of each conversation.
    """
    if samples == 1:
        return np.zeros_like(returns)
    groups = returns.reshape(-1, samples)
    return ((groups.sum(1, keepdims=True) - groups) / (samples - 1)).reshape(-1)


class Value(nn.Module):
    """Value of an observation; starts near zero."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.net = Net(width, 0, hidden, 1, 0.01)

    def forward(self, observation: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
        return self.net(observation)[:, 0]


def value_like(router: AgenticRouter, seed: int) -> Value:
    """A value network of the actor's size: the critic stays as it is, hysteresis rests on it."""
    read = router.policy.actor.net.read
    with seeded(seed):
        return Value(router.observed.width, read.out_features).to(read.weight.device)


@dataclass(frozen=True)
class ValueFit:
    """Explained variance 1 - Var(target - value) / Var(target); NaN if all targets are equal."""

    before: float
    after: float


def fit_value(
    value: nn.Module,
    obs: Float[Tensor, "n d"],
    targets: Float[Tensor, " n"],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> ValueFit:
    """Fit a critic, obs (n, d) -> (n,), to targets by least squares with Adam (eps 1e-5).

    Args:
        generator: CPU generator that shuffles the rows.
    Raises:
        ValueError: the critic's output is not (n,), where broadcasting would fit it to nonsense.
        Diverged: targets or weights are not finite; the critic is left as it was.
    """
    if not torch.isfinite(targets).all():
        raise Diverged(f"{int((~torch.isfinite(targets)).sum())} value targets are not finite.")
    before = explained_variance(value, obs, targets)
    parameters = list(value.parameters())
    saved = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, eps=1e-5)
    for _ in range(epochs):
        for rows in torch.randperm(len(obs), generator=generator, device="cpu").split(batch_size):
            rows = rows.to(obs.device)
            loss = (value(obs[rows]) - targets[rows]).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        with torch.no_grad():
            for parameter, weight in zip(parameters, saved, strict=True):
                parameter.copy_(weight)
        raise Diverged(f"the critic diverged; lower its learning rate ({learning_rate:g}).")
    return ValueFit(before, explained_variance(value, obs, targets))


@torch.no_grad()
def explained_variance(
    value: nn.Module, obs: Float[Tensor, "n d"], targets: Float[Tensor, " n"]
) -> float:
    """1 - Var(target - value) / Var(target): 1 is perfect, 0 is no better than a constant."""
    predicted = value(obs)
    if predicted.shape != targets.shape:
        raise ValueError(
            f"the critic gives {tuple(predicted.shape)} for targets {tuple(targets.shape)}: "
            "it must return one number per row, (n,)."
        )
    spread = targets.double().var(correction=0).item()
    rest = (targets.double() - predicted.double()).var(correction=0).item()
    return 1 - rest / spread if spread > 0 else math.nan
