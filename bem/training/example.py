"""An example: one question with its acceptable answers, and everything that stands around it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bem.config import EVIDENCE_FEATURES, VISION_FEATURES
from bem.errors import DataError


@dataclass(frozen=True)
class Example:
    """One question with its acceptable answers.

    Raises:
        DataError: a field has another type than stated here, or text holds half a character
            (an unpaired surrogate), which no tokenizer can encode.
    """

    id: str
    input: str
    references: tuple[str, ...]
    """Acceptable answers; the first is the one trained on. None at all: the right answer is empty."""
    evidence: tuple[str, ...] = ()
    gold_evidence: tuple[int, ...] = ()
    """Indices of the evidence that the answer follows from."""
    group: str = ""
    """Source document, the cluster of the statistics; empty: the row is its own."""
    task: str = ""
    instruction: str = ""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier (user, assistant) turns of the same conversation."""
    relevance: tuple[float, ...] = ()
    """How good the evidence is, in the order of EVIDENCE_FEATURES; empty: nothing is known of it."""
    meta: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    """System message of the conversation; empty: none, the chat template may put its own."""
    vision: tuple[float, ...] = ()
    """What a vision tower sees, in the order of VISION_FEATURES; empty: there is no picture."""

    def __post_init__(self) -> None:
        for name in ("id", "input", "group", "task", "instruction", "system"):
            _check_text(getattr(self, name), name)
        if not self.id:
            raise DataError("id is empty.")
        for name in ("references", "evidence"):
            object.__setattr__(self, name, _texts(getattr(self, name), name))
        object.__setattr__(self, "gold_evidence", _places(self.gold_evidence, len(self.evidence)))
        object.__setattr__(self, "history", _pairs(self.history))
        for name, known in (("relevance", EVIDENCE_FEATURES), ("vision", VISION_FEATURES)):
            object.__setattr__(self, name, _features(getattr(self, name), name, known))
        if not isinstance(self.meta, dict):
            raise DataError(f"meta must be an object, found {type(self.meta).__name__}.")
        if not self.group:
            object.__setattr__(self, "group", self.id)

    @property
    def prompt(self) -> str:
        """What the user says last: instruction, evidence and input, one per line."""
        return "\n".join(part for part in (self.instruction, *self.evidence, self.input) if part)

    @property
    def answer(self) -> str:
        """The reference that is trained on; "" if there is none."""
        return self.references[0] if self.references else ""


def data_hash(examples: Sequence[Example]) -> str:
    """sha256 of the rows in their order, independent of the file they came from.

    Raises:
        DataError: a row's meta holds something that JSON cannot.
    """
    digest = hashlib.sha256()
    for example in examples:
        values = asdict(example)
        for name in ("system", "vision"):
            if not values[name]:
                del values[name]  # rows without one keep the hash they had before there was one
        try:
            row = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        except TypeError as error:
            raise DataError(
                f"Row {example.id!r}: meta cannot be written as JSON: {error}."
            ) from None
        digest.update(row.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, found {type(value).__name__} {value!r:.40}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):x}"
        raise DataError(
            f"{name} holds half a character (surrogate {half} at {error.start}): repair the encoding."
        ) from None


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        raise DataError(f"{name} must be a list of texts, found {value!r:.60}.")
    for text in value:
        _check_text(text, name)
    return tuple(value)


def _places(value: Any, count: int) -> tuple[int, ...]:
    is_list = isinstance(value, list | tuple)
    if not is_list or not all(type(i) is int and 0 <= i < count for i in value):
        raise DataError(
            f"gold_evidence {value!r:.60} must be a list of indices into {count} evidence texts, "
            "such as [0, 2]."
        )
    return tuple(value)


def _pairs(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        for pair in value
    ):
        raise DataError(
            f"history must hold [user, assistant] pairs of text, or messages, found {value!r:.80}."
        )
    for pair in value:
        for text in pair:
            _check_text(text, "history")
    return tuple((user, assistant) for user, assistant in value)


def _features(value: Any, name: str, known: Sequence[str]) -> tuple[float, ...]:
    n = len(known)
    right = isinstance(value, list | tuple) and len(value) in (0, n)
    if not right or not all(_is_number(v) and 0 <= v <= 1 for v in value):
        raise DataError(
            f"{name} must be {n} numbers from 0 to 1 ({', '.join(known)}), found {value!r:.80}."
        )
    return tuple(float(v) for v in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
