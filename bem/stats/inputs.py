"""Checks on arrays from outside: shape and finiteness, with the offending index in the error."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bem.errors import DataError

Floats = NDArray[np.float64]


def finite(name: str, values: ArrayLike, ndim: int | tuple[int, ...] = 1) -> Floats:
    """`values` as float64 with an allowed number of dimensions; refuses NaN, inf and emptiness.

    Raises:
        DataError: names the array, the first bad index and its value.
    """
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{name} must be numbers in a rectangular array.") from None
    if array.ndim not in allowed:
        raise DataError(f"{name} has shape {array.shape}, expected {allowed} dimension(s).")
    if array.size == 0:
        raise DataError(f"{name} is empty (shape {array.shape}).")
    if not np.isfinite(array).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        where = ", ".join(map(str, index))
        raise DataError(f"{name}[{where}] is {array[index]}: scores must be finite numbers.")
    return array


def over_seeds(name: str, values: ArrayLike) -> Floats:
    """Scores [n] or [seeds, n], averaged over seeds within each example: [n]."""
    array = finite(name, values, (1, 2))
    return array if array.ndim == 1 else array.mean(axis=0)


def cluster_codes(clusters: Any, n: int) -> NDArray[np.intp] | None:
    """Labels as codes 0..C-1 in order of appearance; None if every example is its own cluster."""
    if clusters is None:
        return None
    labels = [str(label) for label in clusters]
    if len(labels) != n:
        raise DataError(f"clusters has {len(labels)} labels for {n} examples.")
    seen: dict[str, int] = {}
    codes = np.array([seen.setdefault(label, len(seen)) for label in labels], dtype=np.intp)
    return None if len(seen) == n else codes


def sum_by_cluster(columns: Floats, codes: NDArray[np.intp] | None) -> Floats:
    """[n, k] columns summed within clusters: [units, k]."""
    if codes is None:
        return columns
    sums = np.zeros((int(codes.max()) + 1, columns.shape[1]))
    np.add.at(sums, codes, columns)
    return sums
