"""When an answer is right depends on its form: JSON is compared parsed, SQL without its spacing.

Every form says when an answer is well formed (validity), when it equals a reference (em) and how
much of it is right (f1). So all metrics exist for all tasks and one measurement can hold several.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bem.stats.scores import (
    exact_match,
    json_validity,
    sentence_bleu,
    sentence_chrf,
    token_f1,
)

QUALITY = "quality"
"""Each row's own primary metric on [0, 1]: what one measurement of several tasks is compared by."""


@dataclass(frozen=True)
class Form:
    """How answers of one kind are judged; every function returns a number in [0, 1]."""

    validity: Callable[[str], float]
    em: Callable[[str, Sequence[str]], float]
    f1: Callable[[str, Sequence[str]], float]


def score(metric: str, form: str, prediction: str, references: Sequence[str]) -> float:
    """One metric of one answer: em, f1, validity in [0, 1]; chrf, bleu in [0, 100]."""
    if metric == "chrf":
        return sentence_chrf(prediction, references)
    if metric == "bleu":
        return sentence_bleu(prediction, references)
    rules = FORMS[form]
    if metric == "validity":
        return rules.validity(prediction)
    return (rules.em if metric == "em" else rules.f1)(prediction, references)


def overlap(answer: Iterable[Any], gold: Iterable[Any]) -> float:
    """F1 of two bags: 2 * shared / (size + size); 1 if both are empty."""
    a, b = Counter(answer), Counter(gold)
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def _by(normal: Callable[[str], Any]) -> Callable[[str, Sequence[str]], float]:
    """Exact match after `normal`."""
    return lambda answer, refs: float(any(normal(answer) == normal(ref) for ref in refs))


def _best(parts: Callable[[str], Iterable[Any]]) -> Callable[[str, Sequence[str]], float]:
    """Best F1 over the references of the parts an answer falls into."""
    return lambda answer, refs: max(overlap(parts(answer), parts(ref)) for ref in refs)


def _said(text: str) -> float:
    return float(bool(text.strip()))


def _one_line(text: str) -> float:
    return float(bool(text.strip()) and "\n" not in text.strip())


def _spaces(text: str) -> str:
    return " ".join(text.split())


# -- JSON


def _json(text: str) -> Any:
    """The parsed value, or a value equal to nothing."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return object()


def slots(text: str) -> list[tuple[str, str]]:
    """Leaves of a JSON value as (path, value), whatever their place in a list. [] if invalid."""

    def leaves(value: Any, path: str) -> Iterable[tuple[str, str]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from leaves(inner, f"{path}.{key}")
        elif isinstance(value, list):
            for inner in value:
                yield from leaves(inner, f"{path}[]")
        else:
            yield path, json.dumps(value)

    return list(leaves(_json(text), "")) if json_validity(text) else []


def _slot_f1(answer: str, references: Sequence[str]) -> float:
    return _best(slots)(answer, references) if json_validity(answer) else 0.0


def _accepts(reference: str, answer: str) -> bool:
    """BFCL: {"f": {"x": [acceptable, ...]}}; "" among them means that x may be left out."""
    allowed, given = _json(reference), _json(answer)
    if not isinstance(allowed, dict) or not isinstance(given, dict) or set(allowed) != set(given):
        return False
    for name, arguments in allowed.items():
        if not isinstance(given[name], dict) or not set(given[name]) <= set(arguments):
            return False
        for key, values in arguments.items():
            values = values if isinstance(values, list) else [values]
            if given[name].get(key, "") not in values:
                return False
    return True


def _call_match(answer: str, references: Sequence[str]) -> float:
    same = _by(_json)(answer, references) or answer.strip() in references
    return float(bool(same) or any(_accepts(ref, answer) for ref in references))


# -- SQL, shell, numbers, names


def normal_sql(text: str) -> str:
    """Lower case, single spaces, none around punctuation, no final semicolon."""
    text = _spaces(text.lower()).rstrip("; ")
    return re.sub(r"\s*([(),=<>!]+)\s*", r"\1", text)


def _sql_shape(text: str) -> float:
    quotes = text.count('"') % 2 == 0 and text.count("(") == text.count(")")
    return float(quotes and text.strip().lower().startswith("select "))


def _shell_shape(text: str) -> float:
    try:
        return float(_one_line(text) and bool(shlex.split(text)))
    except ValueError:
        return 0.0


def _number(text: str) -> float | str:
    try:
        return float(text.strip().replace(",", "").lstrip("$"))
    except ValueError:
        return text.strip()


FORMS: dict[str, Form] = {
    "text": Form(_said, exact_match, token_f1),
    "json": Form(json_validity, _by(_json), _slot_f1),
    "tool": Form(
        lambda t: float(t.strip() == "none" or bool(json_validity(t))),
        _call_match,
        lambda t, refs: float(t.strip() == refs[0]) if refs[0] == "none" else _slot_f1(t, refs[:1]),
    ),
    "sql": Form(_sql_shape, _by(normal_sql), _best(lambda t: normal_sql(t).split())),
    "shell": Form(_shell_shape, _by(_spaces), _best(str.split)),
    "name": Form(
        lambda t: float(t.strip().isidentifier()),
        _by(str.strip),
        _best(lambda t: re.findall(r"[^\s_]+", t)),
    ),
    "label": Form(
        _one_line,
        _by(lambda t: t.strip().lower()),
        _best(lambda t: re.findall(r"[^\s_]+", t.lower())),
    ),
    "number": Form(
        lambda t: float(isinstance(_number(t), float)),
        _by(_number),
        _by(_number),
    ),
    "names": Form(
        lambda t: float(all(part.strip().isidentifier() for part in t.split(","))),
        _by(lambda t: [part.strip() for part in t.split(",")]),
        _best(lambda t: [part.strip() for part in t.split(",")]),
    ),
    "call": Form(
        lambda t: float(re.fullmatch(r"\w+\([^()]*\)", t.strip()) is not None),
        _by(lambda t: re.sub(r"\s+", "", t)),
        _best(lambda t: re.findall(r"\w+", t)),
    ),
    "code": Form(_said, _by(_spaces), _best(lambda t: re.findall(r"\w+|[^\w\s]", t))),
}
"""Form of an answer -> its rules. New form: one line here."""
