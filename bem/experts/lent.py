"""Weights that stand in a slab: one storage for what is named as a parameter and for what acts.

Nobody writes to a slab. So a parameter that is a view of one takes storage of its own before it is written to
or trains (copy on write), and whoever holds the slab keeps exactly what he had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from bem.bases.writes import written


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
        for leaf in tree_iter(written(func, args, kwargs)):
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
