"""JSON answers, compared by what they say: no order of keys, no Python equalities, any length and depth.

In Python true equals 1, 1e400 equals 1e999, and of two equal keys the last one counts. Here a value is
its leaves, each with the path that leads to it, and numbers are compared as decimal numbers.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from typing import Any

from bem.tasks.numbers import canonical_number


class _Number(str):
    """A number in its canonical form."""


class _Object(list[tuple[str, Any]]):
    """(key, value) pairs as they were written."""


def parse(text: str) -> Any:
    """A JSON value (RFC 8259) with objects as pairs and numbers as text.

    Raises:
        ValueError: not JSON, NaN or an infinity, or nested more deeply than Python can read.
    """
    try:
        return json.loads(
            text,
            parse_int=_number,
            parse_float=_number,
            parse_constant=_refuse,
            object_pairs_hook=_Object,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def same(one: Any, other: Any) -> bool:
    """Do two parsed values say the same? An object with one key twice equals nothing."""
    if _has_twins(one) or _has_twins(other):
        return False
    leaves = [sorted((place, leaf) for place, _, leaf in _leaves(v)) for v in (one, other)]
    return leaves[0] == leaves[1]


def equal(answer: str, reference: str) -> bool:
    """Are both JSON, and say the same?"""
    try:
        return same(parse(answer), parse(reference))
    except ValueError:
        return False


def slots(text: str) -> list[tuple[str, str]]:
    """Leaves of a JSON value as (path, value), whatever their place in a list. [] if it is not JSON."""
    try:
        value = parse(text)
    except ValueError:
        return []
    return [(path, leaf) for _, path, leaf in _leaves(value) if leaf not in ("{}", "[]")]


def accepts(reference: str, answer: str) -> bool:
    """BFCL: {"f": {"x": [acceptable, ...]}}; "" among them means that x may be left out."""
    try:
        allowed, given = parse(reference), parse(answer)
    except ValueError:
        return False
    if not isinstance(allowed, _Object) or not isinstance(given, _Object):
        return False
    if _has_twins(allowed) or _has_twins(given):
        return False
    functions, calls = dict(allowed), dict(given)
    return set(functions) == set(calls) and all(
        _accepts_arguments(functions[name], calls[name]) for name in functions
    )


def _accepts_arguments(allowed: Any, given: Any) -> bool:
    if not isinstance(allowed, _Object) or not isinstance(given, _Object):
        return False
    choices, values = dict(allowed), dict(given)
    if not set(values) <= set(choices):
        return False
    for name, acceptable in choices.items():
        listed = acceptable if type(acceptable) is list else [acceptable]
        if not any(same(values.get(name, ""), choice) for choice in listed):
            return False
    return True


def _leaves(value: Any) -> Iterator[tuple[str, str, str]]:
    """(path with places in lists, path without them, leaf as JSON), in order.

    A stack of its own: answers may be nested more deeply than Python calls.
    """
    stack = [("", "", value)]
    while stack:
        place, path, value = stack.pop()
        if isinstance(value, _Object):
            inner = [(f"{place}.{_quoted(k)}", f"{path}.{k}", v) for k, v in value]
        elif isinstance(value, list):
            inner = [(f"{place}[{i}]", f"{path}[]", v) for i, v in enumerate(value)]
        else:
            yield place, path, _leaf(value)
            continue
        if not inner:
            yield place, path, "{}" if isinstance(value, _Object) else "[]"
        stack += reversed(inner)


def _leaf(value: Any) -> str:
    if isinstance(value, _Number):
        return str(value)
    return _quoted(value) if isinstance(value, str) else json.dumps(value)


def _quoted(text: str) -> str:
    return json.dumps(unicodedata.normalize("NFC", text))


def _has_twins(value: Any) -> bool:
    """Does any object have one key twice?"""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, _Object):
            keys = [key for key, _ in value]
            if len(set(keys)) < len(keys):
                return True
            stack += [inner for _, inner in value]
        elif isinstance(value, list):
            stack += value
    return False


def _number(text: str) -> _Number:
    return _Number(canonical_number(text))


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
