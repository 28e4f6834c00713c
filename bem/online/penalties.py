"""What holds a learner near what it knew: Fisher information, elastic weights, a proximal step.

    F_i = E_x sum_y p(y|x) (d/dw_i log p(y|x))^2                    (Kirkpatrick et al. 2017)

exactly over the router's action heads; elsewhere with labels drawn from the model and the gradient of
each sample by itself. The square of a batch's mean gradient is something else: up to 10,000 times
smaller. As estimators differ in scale (sampled labels come to 1.3 times the exact trace, true ones
to .1 times), a strength belongs to one estimator and is stored with its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bem.adapters.learning import settle
from bem.errors import DataError, Diverged
from bem.training.trpo import Policy

Estimator = Literal["exact_heads", "sampled"]
Weights = Mapping[str, Tensor]
"""Name -> weights, as `dict(module.named_parameters())`."""


class NamedPolicy(Policy, Protocol):
    """A policy whose weights have names, as the router's `Actor`."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Everything that `distribution` depends on."""
        ...


@dataclass(frozen=True)
class Fisher:
    """Diagonal of a Fisher matrix, mean over rows."""

    estimator: Estimator
    diagonal: dict[str, Tensor]
    """Name of a parameter -> its diagonal, of the parameter's shape."""
    rows: int

    @property
    def trace(self) -> float:
        """Sum of the diagonal."""
        return sum(float(d.double().sum()) for d in self.diagonal.values())


def exact_fisher(
    actor: NamedPolicy,
    obs: Float[Tensor, "n width"],
    masks: Sequence[Tensor],
    rows_at_once: int = 8,
) -> Fisher:
    """Exact over all actions: heads are independent, so that their diagonals add.

    Args:
        masks: bool (n, n_h) per head; an option that is impossible adds nothing.
        rows_at_once: the gradients of so many rows, for all options, are in memory at a time.
    Raises:
        Diverged: a gradient that is not finite.
    """
    named = trainable(actor)
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for start in range(0, len(obs), rows_at_once):
        rows = slice(start, start + rows_at_once)
        distribution = actor.distribution(obs[rows], [mask[rows] for mask in masks])
        for log_p, p, mask in zip(
            distribution.log_probs, distribution.probs, distribution.masks, strict=True
        ):
            scores = log_p.masked_fill(~mask, 0.0).reshape(-1)  # 0 * -inf would be NaN
            _add_squares(total, named, scores, p.detach().reshape(-1))
    return _fisher("exact_heads", total, len(obs))


def sampled_fisher(log_probs: Float[Tensor, " n"], weights: Weights, at_once: int = 32) -> Fisher:
    """From one label per row, *drawn from the model* and not taken from the data.

    Args:
        log_probs: log p(drawn label | x) of each row, with its graph; of a text the sum over its tokens.
        weights: the parameters in question.
        at_once: gradients in memory at a time.
    Raises:
        Diverged: a gradient that is not finite.
    """
    named = dict(weights)
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for start in range(0, len(log_probs), at_once):
        some = log_probs[start : start + at_once]
        _add_squares(total, named, some, torch.ones_like(some))
    return _fisher("sampled", total, len(log_probs))


def trainable(module: NamedPolicy) -> dict[str, Tensor]:
    """Name -> parameter that may learn."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _add_squares(
    total: dict[str, Tensor], named: Weights, outputs: Tensor, chances: Tensor
) -> None:
    """total += sum_k chances_k (d outputs_k / dw)^2, the gradient of every output by itself."""
    gradients = torch.autograd.grad(
        outputs,
        list(named.values()),
        torch.diag(chances.sqrt()),
        retain_graph=True,
        is_grads_batched=True,
        allow_unused=True,
    )
    for name, gradient in zip(named, gradients, strict=True):
        if gradient is not None:
            total[name] += gradient.detach().square().sum(0)


def _fisher(estimator: Estimator, total: dict[str, Tensor], rows: int) -> Fisher:
    if not rows:
        raise DataError("a Fisher diagonal needs at least one row.")
    for name, diagonal in total.items():
        if not torch.isfinite(diagonal).all():
            raise Diverged(f"the Fisher diagonal of {name} is not finite: the model diverged.")
    return Fisher(estimator, {name: d / rows for name, d in total.items()}, rows)


@dataclass(frozen=True)
class Strength:
    """A factor that means something for one estimator alone."""

    value: float
    estimator: Estimator

    def __post_init__(self) -> None:
        if not 0 <= self.value < math.inf:
            raise ValueError(f"a strength must be finite and not negative, got {self.value}.")
        if self.estimator not in get_args(Estimator):
            raise ValueError(f"no estimator {self.estimator!r}: {', '.join(get_args(Estimator))}.")


class OnlineEwc:
    """Online elastic weight consolidation (Schwarz et al. 2018): one anchor, an old Fisher that fades.

    on an accepted version:   F <- decay F + F_new,   anchor <- its weights
    penalty                   (strength / 2) sum_i F_i (w_i - anchor_i)^2
    """

    def __init__(self, strength: Strength, decay: float = 0.9):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {decay}.")
        self.strength, self.decay = strength, decay
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def accept(self, weights: Weights, fisher: Fisher) -> None:
        """Hold on to a version that its canary has accepted: to no other.

        Raises:
            ValueError: another estimator than the strength is for, or other parameters.
        """
        if fisher.estimator != self.strength.estimator:
            raise ValueError(
                f"strength {self.strength.value:g} is for the {self.strength.estimator} Fisher, this one is "
                f"{fisher.estimator}: their scales differ. Choose a strength for it."
            )
        _same_names(weights, fisher.diagonal)
        if self.fisher:
            _same_names(self.fisher, fisher.diagonal)
        self.fisher = {
            name: new.detach().clone()
            if name not in self.fisher
            else self.decay * self.fisher[name] + new
            for name, new in fisher.diagonal.items()
        }
        self.anchor = {name: weights[name].detach().clone() for name in fisher.diagonal}

    def penalty(self, weights: Weights) -> tuple[Tensor, dict[str, float]]:
        """The penalty, differentiable, and {"ewc": its value}; before the first `accept` it is 0."""
        if not self.fisher:
            return torch.zeros(()), {"ewc": 0.0}
        _same_names(self.fisher, weights)
        parts = [
            (f * (weights[name] - self.anchor[name]).square()).sum()
            for name, f in self.fisher.items()
        ]
        loss = self.strength.value / 2 * torch.stack(parts).sum()
        return loss, {"ewc": float(loss.detach())}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(JSON values, tensors to be kept as safetensors)."""
        plain = {"value": self.strength.value, "estimator": self.strength.estimator}
        tensors = {f"fisher.{name}": f for name, f in self.fisher.items()}
        tensors |= {f"anchor.{name}": a for name, a in self.anchor.items()}
        return {"strength": plain, "decay": self.decay}, tensors

    @staticmethod
    def from_state(plain: Mapping[str, Any], tensors: Weights) -> OnlineEwc:
        """The inverse of `state`.

        Raises:
            DataError: not such a state.
        """
        try:
            ewc = OnlineEwc(Strength(**plain["strength"]), plain["decay"])
        except (KeyError, TypeError, ValueError) as failed:
            raise DataError(f"this is no state of elastic weights: {failed!r}.") from None
        ewc.fisher = _below("fisher.", tensors)
        ewc.anchor = _below("anchor.", tensors)
        if ewc.fisher.keys() != ewc.anchor.keys():
            raise DataError("elastic weights need a Fisher and an anchor of the same parameters.")
        return ewc


@torch.no_grad()
def proximal_step(
    weights: Weights,
    gradients: Weights,
    rate: float,
    accepted: Weights,
    pull: float,
    ewc: OnlineEwc | None = None,
) -> float:
    """One step of gradient descent, with both penalties in closed form, in place.

        w+ = argmin  g w + |w - w_t|^2 / 2 rate + (strength/2) |w - anchor|^2_F + (pull/2) |w - accepted|^2
           = (w_t - rate g + rate strength F anchor + rate pull accepted) / (1 + rate strength F + rate pull)

    Stable at any strength; an explicit step diverges where rate strength F > 2.

    Args:
        weights: changed in place; their gradients by the same names.
        accepted: weights of the last *accepted* version, not those of the step before.
        pull: towards `accepted`, >= 0.
    Returns:
        Length of the step.
    Raises:
        Diverged: a gradient is not finite; nothing was changed.
    """
    if not (rate > 0 and pull >= 0):
        raise ValueError(f"need rate > 0 and pull >= 0, got {rate} and {pull}.")
    _same_names(weights, gradients)
    _same_names(weights, accepted)
    for name, gradient in gradients.items():
        if not torch.isfinite(gradient).all():
            raise Diverged(f"the gradient of {name} is not finite: the step was discarded.")
    fisher, anchor = (ewc.fisher, ewc.anchor) if ewc is not None else ({}, {})
    strength = ewc.strength.value if ewc is not None else 0.0
    squared = 0.0
    for name, w in weights.items():
        top = w - rate * gradients[name] + rate * pull * accepted[name]
        below: Tensor | float = 1 + rate * pull
        if name in fisher:
            top = top + rate * strength * fisher[name] * anchor[name]
            below = below + rate * strength * fisher[name]
        new = top / below
        squared += float((new - w).double().square().sum())
        w.copy_(new)
    settle(weights.values())
    return math.sqrt(squared)


def _same_names(one: Weights, other: Weights) -> None:
    if one.keys() != other.keys():
        differ = sorted(one.keys() ^ other.keys())
        raise ValueError(f"parameters differ: {differ[0]!r} is on one side only, of {len(differ)}.")


def _below(prefix: str, tensors: Weights) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
