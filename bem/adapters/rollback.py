"""A model on which attaching failed is the model that it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

OURS = ("bem_runtime", "bem_lesson")
"""Attributes of a model whose own state changes while something is attached."""


@contextmanager
def rolled_back(model: nn.Module) -> Iterator[None]:
    """If what happens inside raises, for whatever reason, the model is put back as it was.

    Its modules, hooks, attributes, modes and `requires_grad` flags are; the values of its weights are
    not looked at, as attaching never writes to them.
    """
    modules = [_Before(m) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for module in modules:
            module.restore()
        for parameter, flag in flags:
            parameter.requires_grad = flag
        raise


class _Before:
    """One object's attributes, and what its dicts and lists held."""

    def __init__(self, owner: Any):
        self.owner, self.attributes = owner, dict(vars(owner))
        self.contents = {k: _copy(v) for k, v in self.attributes.items() if _is_container(v)}
        inner = (self.attributes.get(name) for name in OURS)
        self.inner = [_Before(each) for each in inner if each is not None]

    def restore(self) -> None:
        vars(self.owner).clear()
        vars(self.owner).update(self.attributes)
        for name, content in self.contents.items():  # the same object: handles of hooks refer to it
            container = self.attributes[name]
            container.clear()
            container.extend(content) if isinstance(content, list) else container.update(content)
        for each in self.inner:
            each.restore()


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list | set)


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else type(value)(value)
