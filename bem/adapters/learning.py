"""What an adapter asks of whoever trains it: our `fit`, transformers' Trainer, TRL or a loop by hand.

Its penalty is part of the loss that the model itself returns, and bounds such as a spectral cap hold
after every step of any torch optimiser. A loop that takes its own loss from the logits adds
`Attached.penalty()`; one that forgets is stopped before its first step.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from bem.errors import TrainingError

COLUMNS = ("turn_starts", "evidence", "vision", "conditioning", "route")
"""Arguments of an adapted model beside the base's own: columns of this name are handed on by Trainer."""
IGNORED = -100

Modules = Callable[[nn.Module], Iterable[nn.Module]]
"""Model -> the modules of its active adapter."""


class Lesson:
    """What the last training pass of a model left to do."""

    def __init__(self, modules: Modules):
        self.modules = modules
        self.penalty_held = False
        """The loss that the model returned holds the penalty."""
        self.penalty_due = False
        """Nobody has added the penalty to a loss."""

    def penalty(self, model: nn.Module) -> Float[Tensor, ""] | None:
        """Sum over the active adapter's modules for the last pass; None if they ask for none."""
        asked = (m.penalty() for m in self.modules(model) if hasattr(m, "penalty"))  # type: ignore[operator]
        terms = [p for p in asked if p is not None]
        return torch.stack(terms).sum() if terms else None

    def add_penalty(
        self, model: nn.Module, output: Any, labels: Int[Tensor, "batch tokens"] | None, items: Any
    ) -> Any:
        """A training pass's output with the penalty in its loss.

        Args:
            labels: as the model got them.
            items: labelled tokens of the whole optimiser step that the loss was divided by, as Trainer
                hands them over; None: the loss is the mean of this pass.
        """
        self.penalty_held = self.penalty_due = False
        penalty = self.penalty(model)
        if penalty is None:
            return output
        loss = None if labels is None else output[0]  # a ModelOutput's first entry too
        if loss is None:
            self.penalty_due = True
            return output
        self.penalty_held = True
        if items is not None:  # the passes of a step add up to one penalty
            penalty = penalty * ((labels[..., 1:] != IGNORED).sum() / items)  # type: ignore[index]
        total = loss + penalty.to(loss.device)
        if isinstance(output, tuple):
            return (total, *output[1:])
        output.loss = total
        return output


_learners: WeakKeyDictionary[nn.Module, Lesson] = WeakKeyDictionary()
"""Modules of adapters -> the lesson of their model."""


def teach(model: nn.Module, modules: Modules) -> None:
    """Give a base that carries an adapter a forward pass that names `COLUMNS`, takes them out for the
    adapter (see `Runtime.call_begins`) and adds the penalty."""
    _watch_optimisers()
    lesson = model.__dict__.setdefault("bem_lesson", Lesson(modules))
    _enrol(model, lesson)
    if hasattr(model.__dict__.get("forward"), "bem_before"):
        return
    before = model.__dict__.get("forward")  # accelerate puts one there
    run = type(model).forward if before is None else lambda _self, *a, **k: before(*a, **k)

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.bem_runtime.call_begins(args, kwargs)
        try:
            output = run(self, *args, **kwargs)
        finally:
            self.bem_runtime.call_ends()
        if self.training and torch.is_grad_enabled():
            _refuse_frozen(output, kwargs.get("labels"))
            _enrol(self, self.bem_lesson)  # a copy of a model has modules of its own
            given = kwargs.get("labels"), kwargs.get("num_items_in_batch")
            return self.bem_lesson.add_penalty(self, output, *given)
        return output

    forward.__signature__ = _with_columns(inspect.signature(type(model).forward))  # type: ignore[attr-defined]
    forward.bem_before = before  # type: ignore[attr-defined]
    model.__dict__["forward"] = MethodType(forward, model)


def _refuse_frozen(output: Any, labels: Any) -> None:
    """Of a loss that no parameter has made torch would only say that it has no gradient."""
    loss = None if labels is None else output[0]
    if isinstance(loss, Tensor) and not loss.requires_grad:
        raise TrainingError(
            "all parameters are frozen, so nothing can be trained. Load the adapter with bem.load(model, folder, "
            "trainable=True) or PeftModel.from_pretrained(..., is_trainable=True). To compute a loss alone, call "
            "model.eval() first, or use torch.no_grad()."
        )


def unteach(model: nn.Module) -> None:
    """Take away what `teach` gave."""
    model.__dict__.pop("bem_lesson", None)
    if hasattr(ours := model.__dict__.get("forward"), "bem_before"):
        del model.__dict__["forward"]
        if ours.bem_before is not None:
            model.__dict__["forward"] = ours.bem_before


def _enrol(model: nn.Module, lesson: Lesson) -> None:
    for module in lesson.modules(model):
        _learners[module] = lesson


def _with_columns(signature: inspect.Signature) -> inspect.Signature:
    kinds = inspect.Parameter
    own = list(signature.parameters.values())
    last = [p for p in own if p.kind is kinds.VAR_KEYWORD]
    extra = [
        kinds(name, kinds.KEYWORD_ONLY, default=None)
        for name in COLUMNS
        if name not in signature.parameters
    ]
    return signature.replace(parameters=[*(p for p in own if p not in last), *extra, *last])


@functools.cache
def _watch_optimisers() -> None:
    """Once in a process: every torch optimiser tells us of its steps."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _moved_by(optimizer: Optimizer) -> list[tuple[nn.Module, Lesson]]:
    """The modules of adapters that hold a parameter of this optimiser."""
    if not _learners:
        return []
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(m, x) for m, x in _learners.items() if any(id(p) in moved for p in m.parameters())]


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    if any(lesson.penalty_due for _, lesson in _moved_by(optimizer)):
        raise TrainingError(
            "the adapter's penalty (alignment or decorrelation) is in no loss: give the model `labels` and train "
            "on the loss that it returns, or add attached.penalty() to your own, or attach with alignment=0 and "
            "decorrelation=0."
        )


def settle(parameters: Iterable[Tensor]) -> None:
    """What follows an optimiser's step, for parameters of adapters that were moved by other means."""
    moved = {id(p) for p in parameters}
    for module in list(_learners):
        if hasattr(module, "after_step") and any(id(p) in moved for p in module.parameters()):
            module.after_step()  # type: ignore[operator]


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for module, _lesson in _moved_by(optimizer):
        if hasattr(module, "after_step"):
            module.after_step()  # type: ignore[operator]
