"""Notes every value that BEM's own code reads back from tensors: on a GPU each would stop the queue."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# their result, or its shape, is something that the host waits for
OPERATIONS = {
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"),
        *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
    )
}
READERS = (
    *("item", "tolist", "numpy", "cpu", "nonzero"),
    *("__bool__", "__int__", "__float__", "__index__"),
)


def _ours() -> str | None:
    """The innermost line of bem/ on the stack, if transformers or torch is not in between."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/bem/" in name and "site-packages" not in name:
            return f"{name.rsplit('/bem/')[-1]}:{frame.f_lineno}"
        if "/transformers/" in name:
            return None
        frame = frame.f_back
    return None


class _Reads(TorchDispatchMode):
    """What goes through the dispatcher: scalars, nonzero and masks as indices."""

    def __init__(self, notes: list[str]):
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        mask = name == "aten::index" and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if (name in OPERATIONS or mask) and (where := _ours()) is not None:
            self.notes.append(f"{name} at {where}")
        return func(*args, **(kwargs or {}))


@contextmanager
def noted() -> Iterator[list[str]]:
    """The reads of everything that runs inside."""
    notes: list[str] = []
    before = {name: getattr(torch.Tensor, name) for name in READERS}

    def wrapped(name):
        def read(self, *args, **kwargs):
            if (where := _ours()) is not None:
                notes.append(f"{name} at {where}")
            return before[name](self, *args, **kwargs)

        return read

    try:
        for name in READERS:
            setattr(torch.Tensor, name, wrapped(name))
        with _Reads(notes):
            yield notes
    finally:
        for name, method in before.items():
            setattr(torch.Tensor, name, method)
