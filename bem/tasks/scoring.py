"""When an answer is right depends on its form: JSON is compared parsed, SQL without its spacing.

Every form says when an answer is well formed (validity), when it equals a reference (em) and how
much of it is right (f1). So all metrics exist for all tasks and one measurement can hold several.

Any text has a score: a model may answer anything. Texts that Unicode calls canonically equivalent are
equal (NFC). No references, or an empty one, say that the empty answer is right.
"""

from __future__ import annotations

import re
import unicodedata
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
from bem.tasks.json_answers import accepts, equal, slots
from bem.tasks.numbers import written_number
from bem.tasks.quoted import (
    is_shell,
    is_sql,
    normal_call,
    normal_code,
    normal_shell,
    normal_sql,
    shell_words,
    sql_words,
)

QUALITY = "quality"
"""Each row's own primary metric on [0, 1]: what one measurement of several tasks is compared by."""
NO_CALL = "none"
"""Answer of the form "tool" where nothing is to be called."""


@dataclass(frozen=True)
class Form:
    """How answers of one kind are judged; every function returns a number in [0, 1]."""

    validity: Callable[[str], float]
    em: Callable[[str, Sequence[str]], float]
    f1: Callable[[str, Sequence[str]], float]


def score(metric: str, form: str, prediction: str, references: Sequence[str]) -> float:
    """One metric of one answer: em, f1, validity in [0, 1]; chrf, bleu in [0, 100]."""
    prediction = unicodedata.normalize("NFC", prediction)
    references = [unicodedata.normalize("NFC", reference) for reference in references] or [""]
    in_points = metric in ("chrf", "bleu")
    if not prediction.strip() and not all(reference.strip() for reference in references):
        return 100.0 if in_points else 1.0
    if in_points:
        points = (sentence_chrf if metric == "chrf" else sentence_bleu)(prediction, references)
        return min(100.0, points)  # sacrebleu's rounding
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


def _best(parts: Callable[[str], Sequence[Any]]) -> Callable[[str, Sequence[str]], float]:
    """Best F1 over the references of the parts an answer falls into."""

    def f1(answer: str, reference: str) -> float:
        given, gold = parts(answer), parts(reference)
        return overlap(given, gold) if given or gold else float(answer.strip() == reference.strip())

    return lambda answer, refs: max(f1(answer, ref) for ref in refs)


def _is_something(text: str) -> float:
    return float(bool(text.strip()))


def _is_one_line(text: str) -> float:
    return float(bool(text.strip()) and "\n" not in text.strip())


def _json_em(answer: str, references: Sequence[str]) -> float:
    return float(any(equal(answer, reference) for reference in references))


def _json_f1(answer: str, references: Sequence[str]) -> float:
    if _json_em(answer, references):
        return 1.0
    parts = slots(answer)
    return max(overlap(parts, slots(ref)) for ref in references) if parts else 0.0


def _call_em(answer: str, references: Sequence[str]) -> float:
    if answer.strip() == NO_CALL:
        return float(NO_CALL in references)
    right = any(equal(answer, ref) or accepts(ref, answer) for ref in references)
    return float(right)


def _call_f1(answer: str, references: Sequence[str]) -> float:
    if references[0] == NO_CALL:
        return float(answer.strip() == NO_CALL)
    return _json_f1(answer, references[:1])


def _number(text: str) -> tuple[bool, str]:
    """(is it a number?, its canonical form, or the text itself)."""
    number = written_number(text)
    return number is not None, text.strip() if number is None else number


FORMS: dict[str, Form] = {
    "text": Form(_is_something, exact_match, token_f1),
    "json": Form(json_validity, _json_em, _json_f1),
    "tool": Form(
        lambda t: float(t.strip() == NO_CALL or bool(json_validity(t))), _call_em, _call_f1
    ),
    "sql": Form(lambda t: float(is_sql(t)), _by(normal_sql), _best(sql_words)),
    "shell": Form(lambda t: float(is_shell(t)), _by(normal_shell), _best(shell_words)),
    "name": Form(
        lambda t: float(t.strip().isidentifier()),
        _by(str.strip),
        _best(lambda t: re.findall(r"[^\s_]+", t)),
    ),
    "label": Form(
        _is_one_line,
        _by(lambda t: t.strip().lower()),
        _best(lambda t: re.findall(r"[^\s_]+", t.lower())),
    ),
    "number": Form(lambda t: float(_number(t)[0]), _by(_number), _by(_number)),
    "names": Form(
        lambda t: float(all(part.strip().isidentifier() for part in t.split(","))),
        _by(lambda t: [part.strip() for part in t.split(",")]),
        _best(lambda t: [part.strip() for part in t.split(",")]),
    ),
    "call": Form(
        lambda t: float(re.fullmatch(r"\w+\([^()]*\)", t.strip()) is not None),
        _by(normal_call),
        _best(lambda t: re.findall(r"\w+", t)),
    ),
    "code": Form(_is_something, _by(normal_code), _best(lambda t: re.findall(r"\w+|[^\w\s]", t))),
}
"""Form of an answer -> its rules. New form: one line here."""
