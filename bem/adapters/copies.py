"""Copies of a model that share its weights: one for each adapter, at the memory of one model.

Nothing is written to the model that is copied, so that another thread may go on using it.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bem.adapters import hooks
from bem.adapters.attach import attach_plan
from bem.adapters.attached import Attached
from bem.adapters.build import Parts
from bem.adapters.peft_method import BemSite, adapters_of
from bem.adapters.quantised import tensors_beside

ADDED = ("generate", "forward", "bem_runtime", "bem_lesson", "peft_config")
"""What attaching adds to a model's own attributes."""


def with_shared_weights(model: nn.Module) -> nn.Module:
    """A copy of the model with the same parameter and buffer tensors."""
    return copy.deepcopy(model, _tensors(model))


def without_adapter(attached: Attached) -> Any:
    """A copy of the base as it was before the adapter, on the same weights; the adapter stays."""
    base = attached.base
    modules = [m for m in base.modules() if not isinstance(m, BemSite)]
    # deepcopy puts in place of each object what the memo holds for it
    memo = _tensors(base) | {id(m): object.__new__(type(m)) for m in modules}
    for site in base.modules():
        if isinstance(site, BemSite):
            memo[id(site)] = memo[id(site.get_base_layer())]
    ours = {handle.id for handle in base.bem_runtime.handles}
    for module in modules:
        vars(memo[id(module)]).update(_plain_state(module, ours, memo))
    return memo[id(base)]


def _plain_state(module: nn.Module, ours: set[int], memo: dict[int, Any]) -> dict[str, Any]:
    """A module's attributes without what attaching added: its names, and hooks by their ids."""
    state = {}
    for name, value in vars(module).copy().items():  # in one step: other threads may set attributes
        if name in ADDED:
            continue
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            value = type(value)((key, hook) for key, hook in value.items() if key not in ours)
        if isinstance(value, hooks._Carried):
            value = value.function
        state[name] = copy.deepcopy(value, memo)
    return state


def shadow(attached: Attached) -> Attached:
    """The same adapter once more, on the same base tensors: its own parameters, hooks and state. Train it
    while the other one answers unchanged. No random number is drawn."""
    parts = {
        site: Parts(*(_own(m) for m in (p.update, p.film, p.controller, p.shaping)))
        for site, p in adapters_of(attached.base, attached.name)
    }
    plain = without_adapter(attached)
    return attach_plan(plain, replace(attached.plan, parts=parts), attached.config, attached.name)


def _own(module: Any) -> Any:
    """A copy with tensors of its own, without what was noted of the last pass."""
    if module is None:
        return None
    noted = {
        id(value): None
        for m in module.modules()
        for value in vars(m).values()
        if isinstance(value, tuple)
        and any(isinstance(t, Tensor) and t.grad_fn is not None for t in value)
    }
    return copy.deepcopy(module, noted)


def _tensors(model: nn.Module) -> dict[int, Any]:
    """Tensors that deepcopy shares."""
    held = (*model.parameters(), *model.buffers(), *tensors_beside(model))
    return {id(tensor): tensor for tensor in held}
