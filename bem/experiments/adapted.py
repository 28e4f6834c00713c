"""Adapters on a base that others go on using: put on inside a `with`, taken off after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from bem.adapters.attach import Attached, attach
from bem.config import AdapterConfig
from bem.routing.mount import load_router
from bem.routing.mounted import Mounted

A = TypeVar("A")


@contextmanager
def put_on(model: Any, make: Callable[[Any], A]) -> Iterator[A]:
    """Whatever `make` puts on the model, inside; the model as it was, bit for bit, after.

    Args:
        model: a bare base. It is adapted in place, so that every reference to it stays good.
        make: attaches something with a `detach` of its own to the model.
    """
    attached: Any = make(model)
    try:
        yield attached
    finally:
        bare = attached.detach()
        assert bare is model, "detaching has to give back the very model that was adapted"


def adapted(model: Any, config: AdapterConfig) -> AbstractContextManager[Attached]:
    """A new adapter on the model, inside a `with`."""
    return put_on(model, lambda base: attach(base, config))


def routed_by(model: Any, folder: Path) -> AbstractContextManager[Mounted]:
    """A saved router and its experts on the model, inside a `with`."""
    return put_on(model, lambda base: load_router(base, folder))
