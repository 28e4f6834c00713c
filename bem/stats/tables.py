"""Text as rows of a table: CSV in its dialects, JSON Lines, a JSON array, lm-eval's samples.

What a file is says its content, not its name. Nothing is guessed that could change a number: a table that
can be read in two ways is refused.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bem.errors import DataError
from bem.files import LINE_END, parse_json, parse_json_lines

DELIMITERS = (",", ";", "\t")
IDS = ("id", "doc_id")
"""Names of the column that holds an example's id."""
_SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|])"?(?:\r\n|\n|\r)', re.I)  # Excel's first line
_LM_EVAL_FIELDS = {
    *("doc_id", "doc", "doc_hash", "target", "target_hash", "arguments", "prompt_hash"),
    *("resps", "filtered_resps", "filter", "metrics"),
}


@dataclass(frozen=True)
class Row:
    """One row, and where it stands."""

    where: str
    """file:line, or file and number where lines do not count."""
    cells: dict[str, Any]
    """By column, in the file's order."""


# --- JSON ---------------------------------------------------------------------------------------


def json_rows(text: str, path: Path) -> list[Row] | Mapping[str, Any]:
    """Rows of JSON Lines or of an array; any other single object as it is.

    Raises:
        DataError: not JSON (names the line), or a row that is no object.
    """
    first, *rest = LINE_END.split(text.strip(), maxsplit=1)
    if rest and _is_json(first):
        return _objects(((f"{path}:{n}", row) for n, row in parse_json_lines(text, path)), path)
    value = parse_json(text, str(path))
    if isinstance(value, list):
        return _objects(((f"{path}, row {n}", row) for n, row in enumerate(value, 1)), path)
    if isinstance(value, Mapping) and not any(name in value for name in IDS):
        return _split(value, path)
    return _objects([(f"{path}:1", value)], path)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _split(value: Mapping[str, Any], path: Path) -> list[Row] | Mapping[str, Any]:
    """Rows of pandas' and MLflow's {"columns": [...], "data": [[...], ...]}."""
    columns, data = value.get("columns"), value.get("data")
    if not isinstance(columns, list) or not isinstance(data, list):
        return value
    rows = []
    for n, cells in enumerate(data, 1):
        if not isinstance(cells, list) or len(cells) != len(columns):
            raise DataError(f"{path}, row {n} must be a list of {len(columns)} cells.")
        rows.append(Row(f"{path}, row {n}", _by_column(map(str, columns), cells, str(path))))
    return rows


def _objects(rows: Iterable[tuple[str, Any]], path: Path) -> list[Row]:
    objects = []
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where} must be an object with an id, got {json.dumps(row)[:40]}.")
        objects.append(Row(where, row))
    return _lm_eval(objects, path) if objects and _is_lm_eval(objects[0]) else objects


def _is_lm_eval(row: Row) -> bool:
    return "doc_id" in row.cells and not {"resps", "filtered_resps"}.isdisjoint(row.cells)


def _lm_eval(rows: list[Row], path: Path) -> list[Row]:
    """Samples of lm-eval (`--log_samples`) as id and metrics.

    Raises:
        DataError: answers of several filters, of which each has scores of its own.
    """
    filters = list(dict.fromkeys(str(row.cells.get("filter")) for row in rows))
    if len(filters) > 1:
        raise DataError(
            f"{path} holds the scores of {len(filters)} filters ({', '.join(filters)}): keep the rows of one."
        )
    return [Row(row.where, _lm_eval_cells(row)) for row in rows]


def _lm_eval_cells(row: Row) -> dict[str, Any]:
    named = row.cells.get("metrics")
    if not isinstance(named, list):  # versions before 0.4.4
        named = [key for key in row.cells if key not in _LM_EVAL_FIELDS]
    if lost := [name for name in named if name not in row.cells]:
        raise DataError(f"{row.where}: metrics names {lost[0]!r}, but the row has no such key.")
    return {"doc_id": row.cells.get("doc_id"), **{str(name): row.cells[name] for name in named}}


# --- CSV ----------------------------------------------------------------------------------------


def csv_rows(text: str, path: Path) -> list[Row]:
    """Rows of comma, semicolon or tab separated values, whatever their line ends and quotes.

    Raises:
        DataError: quotes that do not match, a row longer or shorter than the header, or a column that
            stands twice; names the line.
    """
    separator = _SEPARATOR_LINE.match(text)
    body = text[separator.end() :] if separator else text
    delimiter = separator.group(1) if separator else _delimiter(body)
    records = _records(body, delimiter, path, first_line=2 if separator else 1)
    _, header = next(records, (0, []))
    names = _names([cell.strip() for cell in header])
    rows = []
    for line, cells in records:
        extra = cells[len(names) :]
        if len(cells) < len(names) or any(cell.strip() for cell in extra):
            raise DataError(
                f"{path}:{line} has {len(cells)} cells, the header {len(names)} (separated by "
                f"{delimiter!r}). A decimal comma, or a separator inside text, needs quotes."
            )
        rows.append(Row(f"{path}:{line}", _by_column(names, cells[: len(names)], str(path))))
    return rows


def _delimiter(text: str) -> str:
    """The one by which the header falls into most columns, an id among them."""

    def fit(delimiter: str) -> tuple[bool, int]:
        try:
            _, header = next(_records(text[: 1 << 20], delimiter, Path(), 1), (0, []))
        except DataError:
            return False, 0
        return any(cell.strip().lower() in IDS for cell in header), len(header)

    return max(DELIMITERS, key=fit)


def _records(
    text: str, delimiter: str, path: Path, first_line: int
) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) of every record that is not blank."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a long answer is no error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + first_line
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f'{path}:{line}: {error}. A quoted cell begins and ends with " and doubles every " inside.'
            ) from None
        if any(cell.strip() for cell in cells):
            yield line, cells


def _names(header: list[str]) -> list[str]:
    """Column names; one without a name gets pandas' ("Unnamed: 0")."""
    names = list(header)
    for i, name in enumerate(names):
        if not name:
            names[i] = f"Unnamed: {i}"
            while names.count(names[i]) > 1:
                names[i] += ".1"
    return names


def _by_column(names: Iterable[str], cells: Sequence[Any], where: str) -> dict[str, Any]:
    names = list(names)
    row = dict(zip(names, cells, strict=True))
    if len(row) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where}: column {twice!r} stands twice: delete or rename one.")
    return row


def write_csv(names: Sequence[str], rows: Sequence[Sequence[Any]], delimiter: str) -> str:
    """The text of a table that `csv_rows` reads back."""
    text = io.StringIO(newline="")
    quoted = any(
        "\r" in str(cell) for row in (names, *rows) for cell in row
    )  # else taken for a line's end
    quoting = csv.QUOTE_NONNUMERIC if quoted else csv.QUOTE_MINIMAL
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n", quoting=quoting)
    writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue()


def write_json_lines(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The text of a table as one JSON object per line."""
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
