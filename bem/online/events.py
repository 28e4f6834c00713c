"""What was answered, and what was said of the answer.

    Served      one answered request: version, actions, evidence, prompt, answer, whose it is
    Feedback    one thing said of it: a score, a corrected answer, a preference, an automatic check
    Event       feedback with its sequence number and the requests it is about; or a tombstone

All are JSON: `to_dict` and `..._from_dict` are each other's inverse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from bem.errors import DataError
from bem.files import json_lines, sha256_json

Kind = Literal["score", "correction", "preference", "check"]
LONGEST_NAME, LONGEST_TEXT = 200, 200_000
"""Characters of an id or a user, and of a prompt, an answer or a correction."""


@dataclass(frozen=True)
class Served:
    """The record of one answered request.

    Raises:
        DataError: a field that cannot be right.
    """

    id: str
    version: str
    """Digest of what acted, `Result.version`; "": the bare base."""
    prompt: Any
    """What was asked: text, token ids, messages as JSON, or {"messages": ..., "tools": ...}."""
    answer: str
    user: str = ""
    """On whose behalf: erasure goes by it."""
    actions: tuple[Mapping[str, Any], ...] = ()
    """Of a router, chunk by chunk, as `asdict(ChunkAction)`."""
    evidence: tuple[float, ...] = ()
    """`EvidenceRecord.features()`; (): there was none."""
    slice: str = ""
    """Skill, domain or language, by which falls are told apart; few values."""
    candidate: bool = False
    """A canary's candidate answered, because its coin said so."""
    share: float | None = None
    """The chance with which that coin gave a request to the candidate; None: no coin was tossed."""

    def __post_init__(self) -> None:
        _check_names(self, "id")
        for name in ("version", "user", "slice"):
            _check_text(getattr(self, name), name, LONGEST_NAME)
        _check_text(self.answer, "answer", LONGEST_TEXT)
        if self.share is not None and not 0 < self.share < 1:
            raise DataError(f"share must lie strictly between 0 and 1, got {self.share!r}.")
        object.__setattr__(self, "actions", tuple(dict(a) for a in self.actions))
        object.__setattr__(self, "evidence", tuple(float(e) for e in self.evidence))
        _check_json(asdict(self), f"request {self.id!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "actions": list(self.actions), "evidence": list(self.evidence)}


@dataclass(frozen=True)
class Feedback:
    """One thing that was said of an answer. Exactly the field of its kind is given.

    Raises:
        DataError: a field that cannot be right: says which, with its value.
    """

    id: str
    """Chosen by whoever sends it: the same id twice is one event."""
    request: str
    """Id of the request it is about; of a preference, the one whose answer is better."""
    kind: Kind
    user: str = ""
    """Who says so: shares of what is practised on, and erasure, go by it."""
    score: float | None = None
    """score, check: in [0, 1], higher is better."""
    text: str | None = None
    """correction: what the answer should have been."""
    over: str | None = None
    """preference: id of the request whose answer is worse."""
    check: str = ""
    """check: its name, as "json" or "tool"."""
    at: str = ""
    """The sender's clock. Kept, and never used: order goes by sequence numbers."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise DataError(f"kind {self.kind!r:.40} is none of {', '.join(get_args(Kind))}.")
        _check_names(self, "id", "request")
        for name in ("user", "check", "at"):
            _check_text(getattr(self, name), name, LONGEST_NAME)
        wanted = {"score": "score", "check": "score", "correction": "text", "preference": "over"}
        need = wanted[self.kind]
        given = [name for name in ("score", "text", "over") if getattr(self, name) is not None]
        if given != [need]:
            got = ", ".join(given) or "nothing"
            raise DataError(f"feedback of kind {self.kind} needs {need} alone, got {got}.")
        if need == "score":
            object.__setattr__(self, "score", _score(self.score))
        elif need == "text":
            _check_text(self.text, "text", LONGEST_TEXT)
        else:
            _check_names(self, "over")
        if (self.kind == "check") != bool(self.check):
            raise DataError('a check has a name (check="json"), and nothing else has one.')
        if self.over == self.request:
            raise DataError(f"request {self.request!r} cannot be better than itself.")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without what is not given."""
        values = asdict(self)
        return {name: v for name, v in values.items() if v is not None and v != ""}

    @property
    def digest(self) -> str:
        """sha256 of everything that was said."""
        return sha256_json(self.to_dict())


@dataclass(frozen=True)
class Event:
    """One entry of the log, in the order in which they were accepted."""

    sequence: int
    """From 1, without holes."""
    feedback: Feedback | None
    """None: a tombstone, or feedback that was erased since."""
    request: Served | None = None
    """What the feedback is about; None: erased."""
    over: Served | None = None
    """Of a preference, the request whose answer is worse."""
    erase: str | None = None
    """A tombstone: forget everything of this user that came before."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values: one line of an export."""
        parts = {"feedback": self.feedback, "request": self.request, "over": self.over}
        found = {name: part.to_dict() for name, part in parts.items() if part is not None}
        return {
            "sequence": self.sequence,
            **found,
            **({} if self.erase is None else {"erase": self.erase}),
        }


@dataclass(frozen=True)
class Receipt:
    """What came of handing something in."""

    sequence: int
    """Of the event."""
    new: bool = field(default=True)
    """False: it was known already, and nothing was changed."""


def served_from_dict(values: Any) -> Served:
    """The inverse of `Served.to_dict`; DataError: not such values."""
    return _made(Served, values)


def feedback_from_dict(values: Any) -> Feedback:
    """The inverse of `Feedback.to_dict`; DataError: not such values."""
    return _made(Feedback, values)


def event_from_dict(values: Any) -> Event:
    """The inverse of `Event.to_dict`; DataError: not such values."""
    if not isinstance(values, Mapping) or type(values.get("sequence")) is not int:
        raise DataError("an event is an object with its sequence number.")
    parts = {
        "feedback": feedback_from_dict,
        "request": served_from_dict,
        "over": served_from_dict,
    }
    made = {name: make(values[name]) if name in values else None for name, make in parts.items()}
    return Event(values["sequence"], **made, erase=values.get("erase"))


def read_export(path: str | Path) -> Iterator[Event]:
    """Events of a JSON Lines file that `FeedbackLog.export` wrote.

    Raises:
        DataError: a line that is no event; names it.
    """
    for number, values in json_lines(Path(path)):
        try:
            yield event_from_dict(values)
        except DataError as failed:
            raise DataError(f"{path}:{number}: {failed}") from None


def _made(kind: type, values: Any) -> Any:
    if not isinstance(values, Mapping):
        raise DataError(f"expected an object, found {type(values).__name__}.")
    known = [f.name for f in fields(kind)]
    if odd := [name for name in values if name not in known]:
        raise DataError(f"unknown field {odd[0]!r:.60}. Fields: {', '.join(known)}.")
    try:
        return kind(**values)
    except (TypeError, ValueError) as failed:
        raise DataError(f"{failed}".replace(f"{kind.__name__}.__init__() ", "")) from None


def _score(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (math.isfinite(value) and 0 <= value <= 1):
        raise DataError(f"score must be a number in [0, 1], got {value!r:.40}.")
    return float(value)


def _check_names(record: Any, *names: str) -> None:
    for name in names:
        _check_text(getattr(record, name), name, LONGEST_NAME)
        if not getattr(record, name).strip():
            raise DataError(f"{name} is empty.")


def _check_text(value: Any, name: str, longest: int) -> None:
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, found {type(value).__name__} {value!r:.40}.")
    if len(value) > longest:
        raise DataError(f"{name} has {len(value):,} characters, {longest:,} at most.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):x}"
        raise DataError(f"{name} holds half a character (surrogate {half}).") from None
    if "\0" in value:
        raise DataError(f"{name} holds a NUL character.")


def _check_json(values: Any, what: str) -> None:
    try:
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as failed:
        raise DataError(f"{what} cannot be written as JSON: {failed}.") from None
