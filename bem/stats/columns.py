"""Which column of a score table plays which part; none is dropped unless the caller says so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bem.errors import DataError
from bem.stats.cells import is_empty, is_numeric, of_id
from bem.stats.scores import METRICS, Metric
from bem.stats.tables import IDS, Row

CLUSTERS = ("cluster", "group")
"""Names of the column that holds an example's source document."""
RESERVED = frozenset((*IDS, *CLUSTERS, "seed"))
_DECLARED = re.compile(r"(?P<name>.+?)\s*:\s*(?P<way>higher|lower)(?:\s*:\s*(?P<points>[^:]*))?")
_UNNAMED = re.compile(r"Unnamed: \d+(?:\.\d+)*")
_WHOLE = re.compile(r"-?\d+", re.ASCII)


@dataclass(frozen=True)
class Columns:
    """Which column plays which part."""

    id: str
    cluster: str | None
    seed: str | None
    slices: tuple[str, ...]
    scores: dict[str, str]
    """Column -> metric."""
    declared: dict[str, Metric]


@lru_cache(4096)
def canonical(column: str) -> str:
    """A column's name without spaces around it; names that we know in lower case."""
    name = column.strip()
    lower = name.lower()
    if lower.startswith("slice:"):
        return "slice:" + name[6:].strip()
    return lower if lower in RESERVED or lower in METRICS else name


def without(rows: Sequence[Row], ignore: Sequence[str]) -> tuple[list[Row], list[str], list[str]]:
    """Rows without what the caller ignores and without row numbers; the names of both."""
    columns = list(dict.fromkeys(column for row in rows for column in row.cells))
    asked = {canonical(name) for name in ignore}
    ignored = [column for column in columns if canonical(column) in asked]
    unnamed = [column for column in columns if _UNNAMED.fullmatch(column)]
    numbering = [c for c in unnamed if c not in ignored and _is_numbering(rows, c)]
    dropped = {*ignored, *numbering}
    rest = [
        Row(row.where, {c: v for c, v in row.cells.items() if c not in dropped}) for row in rows
    ]
    return rest, ignored, numbering


def _is_numbering(rows: Sequence[Row], column: str) -> bool:
    """Whether a column without a name (pandas' index) holds row numbers, or nothing at all.

    Raises:
        DataError: it holds anything else, which might be the ids or a score.
    """
    for row in rows:
        text = str(row.cells.get(column, "")).strip()
        if text and not _WHOLE.fullmatch(text):
            raise DataError(
                f"{row.where}: a column without a name ({column!r} to pandas) holds {text!r:.40}. Name it "
                f"(df.to_csv(path, index_label='id')), or leave it out with --ignore '{column}'."
            )
    return True


def same_columns(rows: Sequence[Row]) -> list[Row]:
    """Rows by canonical column names, all with the same ones."""
    first: dict[str, str] = {}  # column -> where it first stood
    named = []
    for row in rows:
        cells = {canonical(column): value for column, value in row.cells.items()}
        if len(cells) < len(row.cells):
            raise DataError(f"{row.where}: two columns are both {_twice(row.cells)!r}: rename one.")
        for column in cells:
            first.setdefault(column, row.where)
        named.append(Row(row.where, cells))
    for row in named:
        for column, where in first.items():
            if column not in row.cells:
                raise DataError(
                    f"{row.where}{of_id(row)}: column {column!r} is missing, which {where} has. Every row "
                    f"needs the same columns; leave one out with --ignore '{column}'."
                )
    return named


def _twice(cells: Mapping[str, Any]) -> str:
    return Counter(map(canonical, cells)).most_common(1)[0][0]


def roles(
    rows: Sequence[Row], path: Path, declared: Mapping[str, Metric], numbering: Sequence[str]
) -> Columns:
    """The part of every column.

    Raises:
        DataError: no id, no metric, a metric twice, or a column of which nothing says what it is.
    """
    columns = list(rows[0].cells)
    if not any(name in columns for name in IDS):
        raise DataError(_no_id(path, columns, numbering))
    meanings = dict(declared)
    slices = tuple(c for c in columns if c.startswith("slice:") and c != "slice:")
    rest = [c for c in columns if c not in RESERVED and c not in slices]
    metrics = {column: _metric_of(path, column, meanings) for column in rest}
    _refuse_unknown(rows, path, [column for column, name in metrics.items() if name is None])
    scores = {column: name for column, name in metrics.items() if name is not None}
    if not scores:
        raise DataError(f"{path} has no metric; its columns are {', '.join(columns)}.")
    name, times = Counter(scores.values()).most_common(1)[0]
    if times > 1:
        raise DataError(f"{path}: metric {name!r} stands in {times} columns: delete all but one.")
    return Columns(
        id=_one_of(IDS, columns, path) or "id",
        cluster=_one_of(CLUSTERS, columns, path),
        seed="seed" if "seed" in columns else None,
        slices=slices,
        scores=scores,
        declared={name: m for name, m in meanings.items() if name in scores.values()},
    )


def _no_id(path: Path, columns: Sequence[str], numbering: Sequence[str]) -> str:
    text = f"{path} has no column id; it has: {', '.join(columns)}. "
    if numbering:
        text += "(A column without a name was taken for row numbers: if it is the id, name it id.) "
    return text + (
        "Every row needs the id of its example, the same in every file, and a comma, semicolon or tab "
        "between the columns."
    )


def _one_of(names: Sequence[str], columns: Sequence[str], path: Path) -> str | None:
    present = [name for name in names if name in columns]
    if len(present) > 1:
        raise DataError(f"{path} has both {' and '.join(present)}: leave one out with --ignore.")
    return present[0] if present else None


def _metric_of(path: Path, column: str, meanings: dict[str, Metric]) -> str | None:
    """The metric's name, None if nothing says what it is; `name:higher[:points]` declares it."""
    if column in METRICS or column in meanings:
        return column
    parts = _DECLARED.fullmatch(column)
    if parts is None:
        if ":" in column:
            raise DataError(f"{path}: column {column!r} must look like 'name:higher:100'.")
        return None
    name, points = canonical(parts["name"]), parts["points"]
    try:
        meanings[name] = Metric(parts["way"] == "higher", float(points) if points else None)
    except (ValueError, DataError) as error:
        raise DataError(f"{path}: column {column!r}: {points!r} are no points: {error}") from None
    return name


def _refuse_unknown(rows: Sequence[Row], path: Path, columns: Sequence[str]) -> None:
    """Names every column that is no metric at once, text apart from numbers."""
    texts = {}
    for column in columns:
        for row in rows:
            value = row.cells[column]
            if not is_empty(value) and not is_numeric(value):
                texts[column] = f"{row.where}{of_id(row)}: column {column!r} holds {value!r:.40}"
                break
    if texts:
        ignore = " ".join(f"--ignore '{column}'" for column in texts)
        raise DataError(
            f"{next(iter(texts.values()))}, which is no score: leave it out ({ignore})."
        )
    for name in columns:
        raise DataError(
            f"{path}: column {name!r} is no metric I know ({', '.join(METRICS)}). Say which way is better: "
            f"'{name}:higher', '{name}:lower', or '{name}:higher:100' with the points in one unit; or leave "
            f"it out (--ignore '{name}')."
        )
