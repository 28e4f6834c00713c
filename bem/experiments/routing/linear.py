"""The control that any router must beat: a linear classifier on the base's mean hidden states.

It reads what the user said in a turn (the tokens since the turn before began, mean over them of the
hidden states that enter the router layer) and names the expert of the turn's skill. Trained on the
makers' labels of the training conversations by multinomial logistic regression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bem.training.data import Encoded
from bem.training.reading import hidden_states


@dataclass(frozen=True)
class Linear:
    """Weights over standardised features."""

    mean: Tensor  # (d_model,)
    scale: Tensor  # (d_model,)
    weight: Float[Tensor, "classes d_model"]
    bias: Tensor  # (classes,)

    def __call__(self, features: Float[Tensor, "turns d_model"]) -> Tensor:
        """Most likely class of each row, from 0: (turns,)."""
        return F.linear((features - self.mean) / self.scale, self.weight, self.bias).argmax(-1)


def fit_linear(
    features: Float[Tensor, "turns d_model"],
    labels: Tensor,
    classes: int,
    decay: float = 1e-3,
) -> Linear:
    """Multinomial logistic regression with an L2 penalty, to convergence (L-BFGS).

    Args:
        labels: (turns,), from 0 to classes - 1.
        decay: weight of the penalty, sum of the squared weights.
    """
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    x = (features - mean) / scale
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return Linear(mean, scale, weight.detach(), bias.detach())


@torch.no_grad()
def turn_features(
    model: Any, rows: Sequence[Encoded], layer: int, pad_id: int, batch_size: int = 16
) -> list[Tensor]:
    """Of each conversation (turns, d_model): the mean hidden state of what was said before each turn.

    Args:
        model: the bare base.
        layer: block whose input is read.
    """
    means: list[Tensor] = [torch.empty(0)] * len(rows)
    for i, states in hidden_states(model, rows, layer, pad_id, batch_size):
        means[i] = _means(states.float().cpu(), rows[i].turn_starts)
    return means


def _means(states: Tensor, starts: list[bool]) -> Tensor:
    """Mean over the tokens from one turn start to the next, that one included."""
    ends = [i for i, s in enumerate(starts) if s]
    begins = [0, *(e + 1 for e in ends[:-1])]
    return torch.stack([states[a : b + 1].mean(0) for a, b in zip(begins, ends, strict=True)])
