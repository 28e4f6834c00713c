"""What writes to a tensor, told by the function that torch is asked for (`__torch_function__`).

Writing through `.data`, NumPy or a view taken before is not seen; setting `.data` is.
"""

from __future__ import annotations

from typing import Any

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


def written(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a function writes to: what it works on in place, a tensor or a list, and its `out`."""
    name = getattr(func, "__name__", "")
    if name in ("__set__", "requires_grad_") and args[-1] is False:
        return ()  # it is frozen, as it was
    name = name.partition(".")[0]  # of an overload
    inplace = name in WRITES or (name.endswith("_") and not name.endswith("__"))
    return (args[:1] or kwargs) if inplace else kwargs.get("out", ())
