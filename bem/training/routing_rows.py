"""Rows that teach which expert should answer: by a label, or by an answer that the oracle judges.

    {"prompt": "Which table holds the orders?", "label": "sql"}           the label decides
    {"prompt": "Which table holds the orders?", "completion": "orders"}   the least loss decides
    {"messages": [{"role": "user", ...}, {"role": "assistant", ...}, {"role": "user", ...}],
     "label": ["support", "sql"]}                                         one label for each turn

All forms of `bem.training.rows`, where an answer may be missing if there is a label. A single label is
that of the turn to come, the last one; null in a list: nobody knows. "base" is the bare base. A row with
both is learned by its label; its answer then only tells what an error costs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bem.errors import DataError
from bem.files import json_lines
from bem.training.example import Example
from bem.training.rows import examples_from_rows, file_stem

BASE = "base"
Labels = tuple[str | None, ...]


@dataclass(frozen=True)
class RoutingExample:
    """One conversation, and what is known of who should answer."""

    row: Example
    labels: Labels = ()
    """Of each turn, None: not known; (): the answers decide."""

    @property
    def answered(self) -> bool:
        """There is a reference answer."""
        return any(self.row.references)


def read_routing_rows(
    source: str | Path | Sequence[Any], experts: Sequence[str]
) -> list[RoutingExample]:
    """Rows of a .jsonl file, or of objects like its lines; `Example`s carry labels as meta["label"].

    Args:
        experts: names that a label may have, beside "base".
    Raises:
        DataError: no rows, or one that cannot be used: its place, what it says and what it should.
    """
    is_file = isinstance(source, str | Path)
    if is_file and not Path(source).is_file():
        raise DataError(f"No examples at {source}: a .jsonl file, one row a line.")
    stem = file_stem(Path(source)) if is_file else "row"
    labels: list[Labels] = []
    given: list[Example] = examples_from_rows(_plain_rows(source, labels, experts), stem=stem)
    if not given:
        raise DataError(f"{source if is_file else 'examples'} holds no rows to learn from.")
    return [_checked(*each) for each in zip(given, labels, strict=True)]


def _plain_rows(
    source: str | Path | Sequence[Any], labels: list[Labels], experts: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """(place, row without its label); the labels are put aside."""
    if isinstance(source, str | Path):
        numbered = ((f"{source}:{number}", row) for number, row in json_lines(Path(source)))
    else:
        numbered = ((f"example {number}", row) for number, row in enumerate(source, 1))
    for where, row in numbered:
        if isinstance(row, Example):
            row = _as_mapping(row)
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: a row must be a JSON object, found {type(row).__name__}.")
        try:
            values = dict(row)
            labels.append(_labels(values.pop("label", None), experts))
            yield where, _with_answer(values, bool(labels[-1]))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


def _as_mapping(row: Example) -> dict[str, Any]:
    values = dict(vars(row))
    label = row.meta.get("label")
    return {**values, "history": [list(pair) for pair in row.history], "label": label}


def _labels(given: Any, experts: Sequence[str]) -> Labels:
    if given is None:
        return ()
    listed = given if isinstance(given, list | tuple) else [given]
    for label in listed:
        if label is not None and label not in (BASE, *experts):
            near = difflib.get_close_matches(str(label), [*experts, BASE], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"label {label!r:.60} names no expert.{hint} Experts: {', '.join(experts)}; "
                f"{BASE!r} is the bare base."
            )
    if not any(listed):
        raise DataError(f"label {given!r} names nobody: leave it out, and give an answer.")
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _with_answer(values: dict[str, Any], labelled: bool) -> dict[str, Any]:
    """A row without an answer in the form of one whose answer is empty."""
    messages: Any = values.get("messages")
    prompt: Any = values.get("prompt")
    if "input" in values:
        open_ended = not values.get("references")
        turned = {**values, "references": values.get("references") or []}
    elif _asks_last(messages):
        open_ended, turned = True, _opened(values, "messages", messages)
    elif prompt is not None and values.get("completion") is None:
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not _asks_last(asked):
            raise DataError(f"prompt must end with what the user asks, found {prompt!r:.80}.")
        open_ended, turned = True, _opened(values, "prompt", asked)
    else:
        open_ended, turned = False, values
    if open_ended and not labelled:
        raise DataError(
            'the row has neither a label nor an answer: add "label": "EXPERT", or the answer.'
        )
    return turned


def _asks_last(messages: Any) -> bool:
    whole = isinstance(messages, list | tuple) and bool(messages)
    return whole and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "user"


def _opened(values: dict[str, Any], name: str, messages: Sequence[Any]) -> dict[str, Any]:
    if values.get("history"):
        raise DataError(f"the row has {name} and history: put the earlier turns into {name}.")
    rest = {k: v for k, v in values.items() if k not in ("messages", "prompt", "completion")}
    *earlier, last = messages
    return {**rest, "history": list(earlier), "input": last.get("content"), "references": []}


def _checked(row: Example, labels: Labels) -> RoutingExample:
    turns = len(row.history) + 1
    if len(labels) == 1:
        labels = (*[None] * (turns - 1), *labels)
    if labels and len(labels) != turns:
        raise DataError(
            f"Row {row.id!r} has {turns} turns and {len(labels)} labels: give one label for each turn of "
            "the user (null: not known), or one alone for the last."
        )
    return RoutingExample(row, labels)
