"""Rows of JSON Lines files and of Hugging Face datasets -> [Example].

A row is an object in one of three forms; the first has every field, the others only their own and `id`,
`group`, `task`, `evidence`, `gold_evidence`, `instruction`, `relevance`, `system`, `meta`:

    {"input": "2+2?", "references": ["4", "four"], "history": [["hi", "hello"]], ...}
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2+2?", "completion": " 4"}        each a text, or a list of messages

The last two are TRL's. Roles alternate user and assistant after an optional system message; the last
assistant message is the answer, earlier pairs are history. Texts are taken as they are: the base's chat
template is put around them when they are encoded (also around a prompt and completion of plain text,
to which TRL adds none), and the one space that parts a completion from its prompt is dropped.

Other column names are mapped: `{"references": "answers.text"}`, dots for nested ones. Columns that no
field names are ignored.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bem.errors import DataError, MissingExtra
from bem.files import json_lines
from bem.training.example import Example
from bem.training.row_forms import ROW_FORMS, in_our_form

FIELDS = tuple(
    dict.fromkeys(
        [*(f.name for f in fields(Example)), *(name for form in ROW_FORMS for name in form)]
    )
)
TEXT_FIELDS = ("id", "input", "group", "task", "instruction", "system", "prompt", "completion")
TEXT_LISTS = ("references", "evidence")


def read_jsonl(
    path: str | Path,
    task: str = "",
    instruction: str = "",
    columns: Mapping[str, str] | None = None,
    stem: str = "",
) -> list[Example]:
    """Examples of a .jsonl or .jsonl.gz file. Nothing is returned unless every line is right.

    Args:
        task: name for rows that carry none.
        instruction: text put before the input of rows that carry none.
        columns: our field -> the file's, as in `load_hf`.
        stem: rows without an id are named STEM-LINE; "": the file's name without its suffix.
    Raises:
        DataError: no such file, no rows, or a line that cannot be used (named as file:line).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"No data file at {path}.")
    rows = ((f"{path}:{number}", row) for number, row in json_lines(path))
    examples = examples_from_rows(rows, task, instruction, stem or file_stem(path), columns)
    if not examples:
        raise DataError(f"{path} holds no rows. Each line must be a JSON object.")
    return examples


def load_hf(
    dataset: str,
    config: str | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    task: str = "",
    instruction: str = "",
) -> list[Example]:
    """Examples of one split of a Hugging Face dataset (needs the extra `datasets`).

    Args:
        dataset: hub id or a local folder.
        columns: our field -> its column, dots for nested ones: {"references": "answers.text"}.
            Fields that are not named are looked up under their own name.
    Raises:
        MissingExtra: the library is not installed.
        DataError: the dataset cannot be loaded, a column is missing, or a row cannot be used.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "datasets", f"Reading {dataset!r}") from None
    try:
        table = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # the library raises dozens of kinds; the user needs the one line
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"Cannot load dataset {dataset!r}, split {split!r}: {reason}") from error
    rows = ((f"{dataset}[{split}][{i}]", row) for i, row in enumerate(table))
    examples = examples_from_rows(rows, task, instruction, split, columns)
    if not examples:
        raise DataError(f"Dataset {dataset!r}, split {split!r} holds no rows.")
    return examples


def examples_from_rows(
    rows: Iterable[tuple[str, Any]],
    task: str = "",
    instruction: str = "",
    stem: str = "row",
    columns: Mapping[str, str] | None = None,
) -> list[Example]:
    """Examples of (place, row) pairs; `place` is what an error message names.

    Raises:
        DataError: a row that cannot be used, one id twice, or `columns` that cannot be followed.
    """
    columns = _checked(columns or {})
    examples: list[Example] = []
    places: dict[str, str] = {}
    for number, (where, row) in enumerate(rows, 1):
        try:
            example = _example(row, columns, task, instruction, f"{stem}-{number}")
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if example.id in places:
            raise DataError(f"{where}: id {example.id!r} was used before, in {places[example.id]}.")
        places[example.id] = where
        examples.append(example)
    return examples


def file_stem(path: Path) -> str:
    """The name of a rows file without .jsonl or .jsonl.gz."""
    return re.sub(r"\.jsonl(\.gz)?$", "", path.name)


def _example(
    row: Any, columns: Mapping[str, str], task: str, instruction: str, default_id: str
) -> Example:
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a JSON object, found {type(row).__name__}.")
    values = in_our_form(_renamed(row, columns), row)
    for name in ("id", "group", "task"):
        values[name] = _label(values.get(name), name)
    for name in TEXT_LISTS:
        if isinstance(values.get(name), str):
            values[name] = [values[name]] if values[name] or name == "references" else []
    values["id"] = values["id"] or default_id
    values["task"] = values["task"] or task
    if values.get("instruction") in (None, ""):
        values["instruction"] = instruction
    return Example(**{name: value for name, value in values.items() if value is not None})


def _label(value: Any, name: str) -> str:
    """A name as text: 0, 0.0 (pandas' form of it) and "0" are the same document."""
    if value is None:
        return ""
    if isinstance(value, str):
        if name == "id" and not value:
            raise DataError("id is empty: leave it out, or give each row its own.")
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    odd = isinstance(value, float) and not math.isfinite(value)
    if odd or isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{name} must be text or a number, found {value!r:.40}.")
    return str(value)


# --- columns ------------------------------------------------------------------------------------


def _checked(columns: Mapping[str, str]) -> Mapping[str, str]:
    unknown = sorted(set(columns) - set(FIELDS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], FIELDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Fields: {', '.join(FIELDS)}."
        raise DataError(f"columns name no field of ours: {', '.join(unknown)}.{hint}")
    if len(_forms_of(columns)) > 1:
        raise DataError(
            f"columns ({', '.join(columns)}) mix two forms of a row. Name the fields of one: "
            f"{' | '.join(' and '.join(form) for form in ROW_FORMS)}."
        )
    return columns


def _forms_of(names: Iterable[str]) -> list[tuple[str, ...]]:
    return [form for form in ROW_FORMS if set(form) & set(names)]


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row's values by our names; a form that `columns` names rules out the others."""
    named = _forms_of(columns)
    others = {name for form in ROW_FORMS if named and form not in named for name in form}
    values = {name: row[name] for name in FIELDS if name in row and name not in others}
    for name, column in columns.items():
        values[name] = _as_text(_looked_up(row, column, name), name)
    return values


def _looked_up(row: Mapping[str, Any], column: str, name: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise DataError(f"no column {column!r} for {name!r}. Columns: {', '.join(row)}.")
        value = value[key]
    return value


def _as_text(value: Any, name: str) -> Any:
    """A number in a mapped column as text, where text belongs: tables hold answers as numbers."""
    if name in TEXT_LISTS and isinstance(value, list | tuple):
        return [_as_text(item, "input") for item in value]
    if name not in (*TEXT_FIELDS, *TEXT_LISTS) or not isinstance(value, int | float):
        return value
    if not math.isfinite(value):
        raise DataError(f"{name} is {value}: a table's empty cell. Drop the row, or fill it.")
    return str(value)
