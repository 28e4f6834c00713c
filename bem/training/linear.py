"""Plain routers on mean hidden states of the base: what any router must beat.

They read what the user said in a turn (the tokens since the turn before began, mean over them of the
hidden states that enter one layer) and name a class: the nearest of the classes' centroids, or the
most likely one by multinomial logistic regression.
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
from bem.training.hidden import hidden_states

PENALTIES = (1e-2, 1e-1, 1.0, 10.0)
"""Of `fit_linear`, where the rows choose."""


@dataclass(frozen=True)
class Linear:
    """Weights over standardised features."""

    mean: Tensor  # (d_model,)
    scale: Tensor  # (d_model,)
    weight: Float[Tensor, "classes d_model"]
    bias: Tensor  # (classes,)

    def scores(self, features: Float[Tensor, "turns d_model"]) -> Float[Tensor, "turns classes"]:
        """Logit of each class."""
        return F.linear((features - self.mean) / self.scale, self.weight, self.bias)

    def __call__(self, features: Float[Tensor, "turns d_model"]) -> Tensor:
        """Most likely class of each row, from 0: (turns,)."""
        return self.scores(features).argmax(-1)


def fit_linear(
    features: Float[Tensor, "turns d_model"],
    labels: Tensor,
    classes: int,
    decay: float = 1e-3,
) -> Linear:
    """Multinomial logistic regression with an L2 penalty, to convergence (L-BFGS).

    Args:
        labels: (turns,), from 0 to classes - 1; or the wanted probability of each class
            (turns, classes).
        decay: weight of the penalty, sum of the squared weights.
    """
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    x = (features - mean) / scale
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=200,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return Linear(mean, scale, weight.detach(), bias.detach())


def left_out(
    features: Float[Tensor, "turns d_model"],
    wanted: Float[Tensor, "turns classes"],
    folds: Tensor,
    decay: float,
) -> Float[Tensor, "turns classes"]:
    """Logits of each turn by a regression that did not see its fold.

    Args:
        folds: number of each turn's fold (turns,).
    """
    scores = torch.empty_like(wanted)
    for fold in folds.unique().tolist():
        out = folds == fold
        fitted = fit_linear(features[~out], wanted[~out], wanted.shape[1], decay)
        scores[out] = fitted.scores(features[out])
    return scores


def best_linear(
    features: Float[Tensor, "turns d_model"], wanted: Float[Tensor, "turns classes"], folds: Tensor
) -> Linear:
    """The regression under the penalty whose cross-entropy on left-out folds is least."""
    tried = [F.cross_entropy(left_out(features, wanted, folds, p), wanted) for p in PENALTIES]
    penalty = PENALTIES[int(torch.stack(tried).argmin())]
    return fit_linear(features, wanted, wanted.shape[1], penalty)


@dataclass(frozen=True)
class Centroids:
    """The mean of each class, in standardised features."""

    mean: Tensor  # (d_model,)
    scale: Tensor  # (d_model,)
    centroids: Float[Tensor, "classes d_model"]

    def __call__(self, features: Float[Tensor, "turns d_model"]) -> Tensor:
        """Class of the nearest centroid, from 0: (turns,)."""
        return torch.cdist((features - self.mean) / self.scale, self.centroids).argmin(-1)


def fit_centroids(
    features: Float[Tensor, "turns d_model"], wanted: Float[Tensor, "turns classes"]
) -> Centroids:
    """Means of the classes.

    Args:
        wanted: weight of each turn in each class; every class has some.
    """
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    return Centroids(mean, scale, (wanted / wanted.sum(0)).T @ ((features - mean) / scale))


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
