"""Recorded streams: what came in, in order, and what is known of the right answers.

    {"input": "...", "references": ["..."], "user": "u1", "slice": "banking"}     rows, in any form of training.rows
    {"sequence": 7, "feedback": {...}, "request": {...}}                          what `FeedbackLog.export` wrote

A row's references are the corrections of whoever asked. Of exported feedback, a correction, the better
answer of a preference and an answer with full marks are references too. A lower score says nothing of
another answer: such an event can only be scored where the same answer is given again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bem.errors import DataError
from bem.files import json_lines
from bem.online.events import Event, event_from_dict
from bem.training.example import Example
from bem.training.rows import examples_from_rows, file_stem

FULL_MARKS = 0.999


@dataclass(frozen=True)
class Turn:
    """One request of a stream, or a tombstone."""

    row: Example | None
    """What is asked; its references are right answers, if any are known. None: a tombstone."""
    source: str
    """Who is answerable for the feedback. A row without a user is a source of its own."""
    slice: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Answer -> the score that was given to it."""
    erase: str | None = None
    """Forget everything of this source."""

    @property
    def labelled(self) -> bool:
        """Can any answer be judged? Only where a right one is known."""
        return self.row is not None and bool(self.row.references)


def read_stream(path: str | Path) -> list[Turn]:
    """All turns of a JSON Lines file.

    Raises:
        DataError: no such file, no rows, or a line that cannot be used: names it.
    """
    path = Path(path)
    turns = [_turn(values, f"{path}:{number}", path) for number, values in json_lines(path)]
    found = [turn for turn in turns if turn is not None]
    if not found:
        raise DataError(f"{path} holds no stream: one JSON object a line, see docs/online.md.")
    return list(_unique(found))


def turn_of(event: Event) -> Turn | None:
    """A turn of the log; None: there is nothing to ask (erased), or nothing that a row could hold."""
    if event.erase is not None:
        return Turn(None, event.erase, erase=event.erase)
    said, asked = event.feedback, event.request
    if said is None or asked is None or not _has_row(asked.prompt):
        return None
    right: tuple[str, ...] = ()
    scores: dict[str, float] = {}
    if said.kind == "correction":
        right = (str(said.text),)
    elif said.kind == "preference":
        right = (asked.answer,)
    else:
        assert said.score is not None
        scores = {asked.answer: said.score}
        right = (asked.answer,) if said.score >= FULL_MARKS else ()
    row = _example(asked.prompt, f"event-{event.sequence}", f"event {event.sequence}")
    # a check is the machine's: no user's share is used up by it
    source = said.user or ("check" if said.kind == "check" else "")
    return Turn(replace(row, references=right), source, asked.slice, scores)


def _turn(values: Any, where: str, path: Path) -> Turn | None:
    if not isinstance(values, Mapping):
        raise DataError(f"{where}: a line must be a JSON object, found {type(values).__name__}.")
    if "sequence" in values:
        try:
            return turn_of(event_from_dict(values))
        except DataError as failed:
            raise DataError(f"{where}: {failed}") from None
    row = {k: v for k, v in values.items() if k not in ("user", "slice")}
    names = {k: values.get(k) or "" for k in ("user", "slice")}
    for name, value in names.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} must be text, found {value!r:.40}.")
    number = where.rpartition(":")[2]
    example = examples_from_rows([(where, row)], stem=f"{file_stem(path)}-{number}")[0]
    return Turn(example, names["user"] or f"row {example.id}", names["slice"])


def _has_row(prompt: Any) -> bool:
    """Not token ids, nor a conversation with tools."""
    if isinstance(prompt, list):
        return all(isinstance(message, Mapping) for message in prompt)
    return not (isinstance(prompt, Mapping) and "tools" in prompt)


def _example(prompt: Any, id: str, where: str) -> Example:
    """What was asked, without an answer."""
    form = {"prompt": prompt} if isinstance(prompt, str | list) else {"prompt": str(prompt)}
    row = {**form, "completion": "", "id": id}
    return replace(examples_from_rows([(where, row)])[0], references=())


def _unique(turns: list[Turn]) -> Iterator[Turn]:
    seen: set[str] = set()
    for turn in turns:
        if turn.row is not None:
            if turn.row.id in seen:
                raise DataError(f"id {turn.row.id!r} stands twice: every turn needs its own.")
            seen.add(turn.row.id)
        yield turn
