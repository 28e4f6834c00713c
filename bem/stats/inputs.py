"""Checks on arrays from outside: kind, shape and finiteness, with the offending place in the error."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bem.errors import DataError

Floats = NDArray[np.float64]

LARGEST = 1e150
"""Scores beyond this are refused: sums of their squares overflow double precision."""
ROUNDING = 1e-12
"""Numbers that differ by less than this share of their size differ by rounding alone."""


def numbers(name: str, values: ArrayLike) -> Floats:
    """`values` as float64; NaN and inf are let through.

    Booleans, integers and floats of any width are read, and objects that are numbers (Decimal,
    Fraction, None as NaN).

    Raises:
        DataError: text, dates, complex numbers, rows of unequal length, masked entries, or integers
            beyond double precision; names the array.
    """
    _refuse_masked(name, values)
    try:
        array = np.asarray(values)
        if array.dtype.kind == "O":
            _refuse_text(name, array)
        elif array.dtype.kind not in "biuf":
            raise DataError(f"{name} must be numbers, got {array.dtype.name}: {_excerpt(array)}.")
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"{name} must be numbers in a rectangular array: {error}.") from None


def _refuse_masked(name: str, values: Any) -> None:
    parts = values if isinstance(values, list | tuple) else [values]
    hidden = sum(np.ma.count_masked(part) for part in parts if np.ma.isMaskedArray(part))
    if hidden:
        raise DataError(
            f"{name} has {hidden} masked entries. Leave these examples out (x.compressed()), in every arm, "
            "or give them a score (x.filled(0))."
        )


def _refuse_text(name: str, array: NDArray) -> None:
    texts = [value for value in array.ravel() if isinstance(value, str | bytes)]
    if texts:
        raise DataError(f"{name} must be numbers, found the text {texts[0]!r:.40}.")


def _excerpt(array: NDArray) -> str:
    return ", ".join(f"{value!s:.40}" for value in array.ravel()[:2])


def finite(name: str, values: ArrayLike, ndim: int | tuple[int, ...] = 1) -> Floats:
    """`values` as float64 with an allowed number of dimensions; refuses NaN, inf and emptiness.

    Raises:
        DataError: names the array, the first bad index and its value.
    """
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    array = numbers(name, values)
    if array.ndim not in allowed:
        raise DataError(f"{name} has shape {array.shape}, expected {allowed} dimension(s).")
    if array.size == 0:
        raise DataError(f"{name} is empty (shape {array.shape}).")
    bad = np.argwhere(~(np.abs(array) <= LARGEST))  # also true for NaN
    if bad.size:
        index = tuple(int(i) for i in bad[0])
        place = f"{name}[{', '.join(map(str, index))}] is {array[index]}"
        if np.isfinite(array[index]):
            raise DataError(f"{place}: beyond {LARGEST:g} statistics overflow. Use a larger unit.")
        raise DataError(f"{place}: scores must be finite numbers.")
    return array


def over_seeds(name: str, values: ArrayLike) -> Floats:
    """Scores [n] or [seeds, n], averaged over seeds within each example: [n]."""
    array = finite(name, values, (1, 2))
    return array if array.ndim == 1 else array.mean(axis=0)


def difference(new: Floats, old: Floats) -> Floats:
    """new - old; scores that differ by rounding alone differ by exactly 0.

    A mean over seeds or a sum in another order moves the last digits: that is no effect.
    """
    gap = new - old
    gap[np.abs(gap) <= ROUNDING * np.maximum(np.abs(new), np.abs(old))] = 0.0
    return gap


def label(name: str, value: Any) -> str:
    """An id or a cluster as text: 7, 7.0 and "7" are the same one.

    Raises:
        DataError: None, NaN or pandas' NA, which would lump together whatever has no label.
    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    text = str(value)
    if value is None or text in ("nan", "<NA>", "NaT", "--"):  # "--" is numpy's masked
        raise DataError(f"{name} is {text}: every example needs one.")
    return text


def labels(name: str, values: Any) -> tuple[str, ...]:
    """`label` of each value.

    Raises:
        DataError: a single text instead of a list of them, no list at all, or a missing label (with
            its index).
    """
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise DataError(f"{name} must be a list, got {values!r:.40}.")
    return tuple(label(f"{name}[{i}]", value) for i, value in enumerate(values))


def cluster_codes(clusters: Any, n: int) -> NDArray[np.intp] | None:
    """Labels as codes 0..C-1 in order of appearance; None if every example is its own cluster."""
    if clusters is None:
        return None
    names = labels("clusters", clusters)
    if len(names) != n:
        raise DataError(f"clusters has {len(names)} labels for {n} examples.")
    code_of = {name: code for code, name in enumerate(dict.fromkeys(names))}
    return None if len(code_of) == n else np.array([code_of[name] for name in names], dtype=np.intp)


def sum_by_cluster(columns: Floats, codes: NDArray[np.intp] | None) -> Floats:
    """[n, k] columns summed within clusters: [units, k]."""
    if codes is None:
        return columns
    sums = np.zeros((int(codes.max()) + 1, columns.shape[1]))
    np.add.at(sums, codes, columns)
    return sums
