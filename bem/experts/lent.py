"""Weights that stand in a slab: one storage for what is named as a parameter and for what acts.

Nobody writes to a slab. So a parameter that is a view of one takes storage of its own before it is written to
or trains (copy on write), and whoever holds the slab keeps exactly what he had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

WRITES = frozenset(
    (
        "__set__",
        "__setitem__",
        "__iadd__",
        "__isub__",
        "__imul__",
        "__itruediv__",
        "__idiv__",
        "__ipow__",
    )
)
"""What writes to a tensor beside the functions whose names end in one underscore; `__set__`: of an attribute."""


class LentParameter(nn.Parameter):
    """A frozen parameter that is a view of a slab, until it is written to or trains: then it is an
    `nn.Parameter` like any other.

    Torch tells it of every function that it is given to (`__torch_function__`). Writing through `.data`, NumPy
    or a view taken from it before is not seen, as by `Watch`.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_iter(_written(getattr(func, "__name__", ""), args, kwargs)):
            if isinstance(leaf, LentParameter):
                leaf.own()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def own(self) -> None:
        """Take storage of its own, with the same numbers."""
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
            self.data = self.detach().clone(memory_format=torch.contiguous_format)
            self.__class__ = nn.Parameter  # pyright: ignore[reportAttributeAccessIssue]


def lend(parameter: nn.Parameter, view: Tensor) -> None:
    """Make a frozen parameter a view of a slab that holds the same numbers."""
    with torch._C.DisableTorchFunctionSubclass():
        parameter.data = view
        parameter.__class__ = LentParameter


def _written(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a function writes to: what it works on in place, a tensor or a list, and its `out`."""
    if name in ("__set__", "requires_grad_") and args[-1] is False:
        return ()  # it is frozen, as it was
    name = name.partition(".")[0]  # of an overload
    inplace = name in WRITES or (name.endswith("_") and not name.endswith("__"))
    return (args[:1] or kwargs) if inplace else kwargs.get("out", ())
