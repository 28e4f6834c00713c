"""Numbers as texts: equal if they are the same number, however long, without rounding."""

from __future__ import annotations

import re
import unicodedata

_PARTS = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]+))?")
_WRITTEN = re.compile(
    r"(?:\$?[+-]?|[+-]\$)(?=\.?[0-9])"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?"
)
LONGEST_EXPONENT = 18
"""Digits; longer exponents are compared as they are written."""
PLAIN_ZEROS = 20
"""Zeros that are written out instead of an exponent."""


def canonical_number(text: str) -> str:
    """One text for each number: 1, 1.0, 10e-1 and +1 are "1", and -0 is "0".

    Args:
        text: a decimal number, as JSON writes it (signs, a missing part and leading zeros are fine).
    Raises:
        ValueError: anything else, infinities and NaN included.
    """
    match = _PARTS.fullmatch(text)
    whole, part = (match[2], match[3] or "") if match else ("", "")
    if match is None or not whole + part:
        raise ValueError(f"{text!r:.60} is no decimal number")
    digits = (whole + part).lstrip("0")
    if not digits:
        return "0"
    shortened = digits.rstrip("0")
    sign, shift = match[1].replace("+", ""), len(digits) - len(shortened) - len(part)
    exponent = (match[4] or "0").replace("+", "")
    if len(exponent.lstrip("-").lstrip("0")) > LONGEST_EXPONENT:
        return f"{sign}{shortened}e({exponent})e{shift}"
    power = int(exponent) + shift
    if 0 <= power <= PLAIN_ZEROS:
        return sign + shortened + "0" * power
    return f"{sign}{shortened}e{power}"


def written_number(text: str) -> str | None:
    """`canonical_number` of a number as people write it, "$1,200.50"; None if it is none.

    Commas part groups of three digits; "nan", "inf" and "12,34" are no numbers.
    """
    text = unicodedata.normalize("NFKC", text).strip()
    if not _WRITTEN.fullmatch(text):
        return None
    return canonical_number(text.replace(",", "").replace("$", ""))
