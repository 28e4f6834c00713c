"""What a cell of a score table says: an id, a number, a boolean, or that nothing is there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite
from typing import Any

from bem.errors import DataError
from bem.stats.inputs import label
from bem.stats.tables import IDS, Row

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}", re.ASCII)
_BOOLEANS = {"true": 1.0, "false": 0.0}
_MISSING = frozenset(("", "nan", "na", "n/a", "#n/a", "<na>", "null", "none"))


def is_empty(value: Any) -> bool:
    """Nothing, or spaces."""
    return value is None or (isinstance(value, str) and not value.strip())


def is_numeric(value: Any) -> bool:
    """A number, a boolean or the text of one; with a decimal comma too."""
    comma = isinstance(value, str) and _COMMA.fullmatch(value.strip())
    return bool(comma) or _plain_number(value) is not None


def of_id(row: Row) -> str:
    """` (id 'q1')`, where the row has one: what every message about it says."""
    value = next((row.cells[name] for name in IDS if name in row.cells), None)
    return "" if value is None else f" (id {value!r:.60})"


def text_of(row: Row, column: str) -> str:
    """An id, seed or cluster: text or a number, without the spaces around it.

    Raises:
        DataError: nothing there, a boolean, a list or an object; names the line.
    """
    value = row.cells[column]
    if is_empty(value):
        raise DataError(f"{_place(row, column)} is missing: every row needs one.")
    if isinstance(value, bool | list | dict):
        raise DataError(f"{_place(row, column)} is {value!r:.40}: text or a number is needed.")
    if isinstance(value, float) and not isfinite(value):
        raise DataError(f"{_place(row, column)} is {value}: every row needs one.")
    text = label(column, value).strip()
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{_place(row, column)} is {value!r:.40}: half a character (a surrogate).")
    return text


def _place(row: Row, column: str) -> str:
    return f"{row.where}{of_id(row)}: column {column!r}"


def number_of(row: Row, column: str, decimal_comma: bool = False) -> float:
    """A finite number; true and false are 1 and 0.

    Raises:
        DataError: nothing there, NaN, infinite or no number; names the line, the id and what to do.
    """
    value = row.cells[column]
    if isinstance(value, str) and decimal_comma:
        value = value.replace(",", ".")
    number = _plain_number(value)
    if number is not None and isfinite(number):
        return number
    where = _place(row, column)
    if number is not None or str(value).strip().lower() in _MISSING:
        shown = "missing" if is_empty(value) else f"{value!s:.40}"
        raise DataError(
            f"{where} is {shown}: every row needs a finite score. Score the example, or leave it out of "
            "every file."
        )
    raise DataError(f"{where} is {value!r:.40}, not a number.")


def _plain_number(value: Any) -> float | None:
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return float("inf")
    if not isinstance(value, str):
        return None
    text = value.strip()
    if text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    return float(text) if _NUMBER.fullmatch(text) else None


def decimal_commas(rows: Sequence[Row], columns: Sequence[str]) -> bool:
    """Whether these columns are written with a decimal comma (0,5).

    Raises:
        DataError: with commas and with points, or so that 1,250 may be 1.25 or 1250; names the line.
    """
    cells = [
        (row.where, row.cells[c].strip())
        for row in rows for c in columns if isinstance(row.cells[c], str)
    ]  # fmt: skip
    commas = [(where, text) for where, text in cells if _COMMA.fullmatch(text)]
    points = [(where, text) for where, text in cells if "." in text and _NUMBER.fullmatch(text)]
    if commas and points:
        raise DataError(
            f"{commas[0][0]} has {commas[0][1]!r} and {points[0][0]} has {points[0][1]!r}: write every number "
            "with a decimal point."
        )
    if commas and all(_THOUSANDS.fullmatch(text) for _, text in commas):
        where, text = commas[0]
        raise DataError(
            f"{where}: is {text!r} {text.replace(',', '.')} or {text.replace(',', '')}? Write decimal points, "
            "and no separators of thousands."
        )
    return bool(commas)
