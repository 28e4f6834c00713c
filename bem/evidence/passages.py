"""Passages: what is indexed, retrieved and shown to the model; read from JSONL files.

    {"id": "p1", "title": "Ada Lovelace", "text": "..."}       id and title are optional
    {"id": "h0", "input": "Ada Lovelace", "references": [], "evidence": ["..."]}
    {"id": "q7", "input": "Who ...?", "references": ["..."], "evidence": ["...", "..."]}

In the second form (a row without an answer) the input is the passage's title. The third is a question with
its evidence: each text becomes a passage `q7#0`, `q7#1`, and the question itself never enters the
index, where it would give its own answer away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bem.errors import DataError
from bem.files import json_lines


@dataclass(frozen=True)
class Passage:
    """One retrievable text."""

    id: str
    text: str
    title: str = ""

    @property
    def shown(self) -> str:
        """What goes into a prompt and into the index: "title: text", or the text alone."""
        return f"{self.title}: {self.text}" if self.title else self.text


def read_corpus(path: str | Path) -> list[Passage]:
    """Every passage of a .jsonl or .jsonl.gz file, in order; see the module's docstring for rows.

    Raises:
        DataError: no such file, no passages, or a row that is not usable; names file and line.
    """
    path = Path(path)
    passages: list[Passage] = []
    lines: dict[str, int] = {}
    for number, row in json_lines(path):
        for passage in _passages(row, number, f"{path}:{number}"):
            if passage.id in lines:
                raise DataError(
                    f"{path}:{number}: id {passage.id!r} was already used in line "
                    f"{lines[passage.id]}. Sources are named by id, so each needs its own."
                )
            lines[passage.id] = number
            passages.append(passage)
    if not passages:
        raise DataError(f"{path} holds no passages.")
    return passages


def corpus_hash(passages: Iterable[Passage]) -> str:
    """sha256 over ids, titles and texts, in order."""
    digest = hashlib.sha256()
    for passage in passages:
        for part in (passage.id, passage.title, passage.text):
            encoded = part.encode("utf-8", "surrogatepass")
            # With its length in front, no text can imitate the boundary between two fields.
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()


def distinct(passages: Sequence[Passage]) -> list[Passage]:
    """The first passage of each text as shown; copies under other ids add nothing to a search.

    Raises:
        DataError: no passages, or one id for two texts.
    """
    if not passages:
        raise DataError("There are no passages to index.")
    first: dict[str, Passage] = {}
    texts: dict[str, str] = {}
    for passage in passages:
        if texts.setdefault(passage.id, passage.shown) != passage.shown:
            raise DataError(f"Two different passages have the id {passage.id!r}.")
        first.setdefault(passage.shown, passage)
    return list(first.values())


def _passages(row: Any, number: int, where: str) -> Iterator[Passage]:
    if not isinstance(row, dict):
        raise DataError(f'{where}: a row must be an object with a "text", got {row!r:.40}.')
    name = _name(row.get("id"), number, where)
    if "text" in row:
        yield Passage(name, _text(row["text"], where), _string(row.get("title"), where, "title"))
        return
    texts = row.get("evidence")
    if not isinstance(texts, list):
        raise DataError(
            f'{where} has neither "text" nor a list "evidence"; it has: {", ".join(row) or "nothing"}.'
        )
    if row.get("references"):
        for index, text in enumerate(texts):
            yield Passage(f"{name}#{index}", _text(text, where))
    elif len(texts) == 1:
        yield Passage(name, _text(texts[0], where), _string(row.get("input"), where, "input"))
    else:
        raise DataError(f"{where}: a row without references is one passage, found {len(texts)}.")


def _name(value: Any, number: int, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise DataError(f"{where}: id must be text or a number, got {value!r:.40}.")
    return str(number if value is None else value)


def _text(value: Any, where: str) -> str:
    text = _string(value, where, "text")
    if not text.strip():
        raise DataError(f"{where}: the text is empty. Drop the row.")
    return text


def _string(value: Any, where: str, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} must be a string, got {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {field} holds half a character (surrogate \\u{ord(value[error.start]):x} at "
            f"{error.start}). Repair the file's encoding."
        ) from None
    return value
