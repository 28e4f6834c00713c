"""Copies of a model that share its weights: one for each adapter, at the memory of one model."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from bem.adapters.attached import Attached
from bem.adapters.peft_method import BemSite, rewire

ADDED = ("generate", "forward", "bem_runtime", "bem_lesson", "peft_config")
"""What attaching adds to a model's own attributes."""


def with_shared_weights(model: nn.Module) -> nn.Module:
    """A copy of the model with the same parameter and buffer tensors."""
    return copy.deepcopy(model, _tensors(model))


def without_adapter(attached: Attached) -> Any:
    """A copy of the base as it was before the adapter, on the same weights; the adapter stays."""
    base, memo = attached.base, _tensors(attached.base)
    sites = [m for m in base.modules() if isinstance(m, BemSite)]
    memo |= {id(site): with_shared_weights(site.get_base_layer()) for site in sites}
    memo |= {id(base.__dict__[name]): None for name in ADDED if name in base.__dict__}
    base.bem_runtime.remove()  # its hooks would be copied
    try:
        plain = copy.deepcopy(base, memo)
    finally:
        rewire(base)
    for name in ADDED:
        plain.__dict__.pop(name, None)
    return plain


def _tensors(model: nn.Module) -> dict[int, Any]:
    """Tensors that deepcopy shares."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    return memo | {id(b): b for b in model.buffers()}
