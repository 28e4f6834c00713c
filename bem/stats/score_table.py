"""Rows of scores as a measurement, and back. Every refusal names the line, the id and what to do.

Columns: see `bem.stats.files`. Each row must have all of them, and a row that cannot be used is never
dropped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bem.errors import DataError
from bem.stats.cells import decimal_commas, number_of, of_id, text_of
from bem.stats.columns import Columns, roles, same_columns, without
from bem.stats.measurement import Measurement, outside
from bem.stats.scores import METRICS, Metric
from bem.stats.tables import Row


@dataclass(frozen=True)
class _Score:
    """One row, read."""

    where: str
    id: str
    seed: str | None
    cluster: str | None
    slices: tuple[float, ...]
    scores: tuple[float, ...]


def measurement_of(
    rows: Sequence[Row], path: Path, declared: Mapping[str, Metric], ignore: Sequence[str]
) -> Measurement:
    """The measurement that a table holds; `meta["ignored"]` names the columns that were left out.

    Raises:
        DataError: see `bem.stats.files.load`.
    """
    if not rows:
        raise DataError(f"{path} has no rows.")
    rest, ignored, numbering = without(rows, ignore)
    rows = same_columns(rest)
    columns = roles(rows, path, declared, numbering)
    comma = decimal_commas(rows, [*columns.scores, *columns.slices])
    table = _whole_ids([_read(row, columns, comma) for row in rows])
    return _assembled(table, path, columns, ignored)


def _read(row: Row, columns: Columns, comma: bool) -> _Score:
    example = text_of(row, columns.id)
    seed = text_of(row, columns.seed) if columns.seed else None
    cluster = text_of(row, columns.cluster) if columns.cluster else None
    slices = tuple(_score(row, c, comma, _member) for c in columns.slices)
    scores = []
    for column, metric in columns.scores.items():
        meaning = columns.declared.get(metric) or METRICS[metric]
        scores.append(_score(row, column, comma, partial(outside, metric, meaning)))
    return _Score(row.where, example, seed, cluster, slices, tuple(scores))


def _score(row: Row, column: str, comma: bool, problem_of: Callable[[float], str]) -> float:
    value = number_of(row, column, comma)
    if problem := problem_of(value):
        shown = f"{row.cells[column]!r:.40}"
        raise DataError(f"{row.where}{of_id(row)}: column {column!r} is {shown}; {problem}")
    return value


def _member(value: float) -> str:
    return "" if value in (0.0, 1.0) else "a slice holds an example (1) or not (0)."


def _whole_ids(table: list[_Score]) -> list[_Score]:
    """Ids that pandas made floats (1.0, 2.0, ...) as the whole numbers that they were."""
    if not all(re.fullmatch(r"\d+\.0", row.id) for row in table):
        return table
    return [replace(row, id=row.id[:-2]) for row in table]


def _assembled(
    table: Sequence[_Score], path: Path, columns: Columns, ignored: list[str]
) -> Measurement:
    by_seed = _by_seed(table) if columns.seed else _by_repetition(table)
    ids = list(next(iter(by_seed.values())))
    for seed, part in by_seed.items():
        if lost := sorted(set(ids) ^ set(part), key=str):
            short = part if lost[0] in ids else by_seed[next(iter(by_seed))]
            raise DataError(
                f"{path}: seed {seed} does not hold the examples of seed {next(iter(by_seed))}: id "
                f"{lost[0]!r} is in one of them alone ({len(short)} rows)."
            )
    groups = _constant(table)
    values = [[part[i].scores for i in ids] for part in by_seed.values()]
    cube = np.array(values, dtype=np.float64).reshape(len(by_seed), len(ids), len(columns.scores))
    slices = np.array([groups[i].slices for i in ids]).reshape(len(ids), len(columns.slices))
    try:
        return Measurement(
            name=stem(path),
            metrics={m: cube[:, :, j] for j, m in enumerate(columns.scores.values())},
            example_ids=ids,
            clusters=[str(groups[i].cluster) for i in ids] if columns.cluster else None,
            slices={c[6:]: slices[:, j] for j, c in enumerate(columns.slices)},
            declared=columns.declared,
            meta={"ignored": ignored} if ignored else {},
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _by_seed(table: Sequence[_Score]) -> dict[str, dict[str, _Score]]:
    seeds: dict[str, dict[str, _Score]] = {}
    for row in table:
        part = seeds.setdefault(str(row.seed), {})
        if (first := part.setdefault(row.id, row)) is not row:
            raise DataError(
                f"{row.where}: id {row.id!r} appears twice in seed {row.seed}, first in {first.where}."
            )
    return seeds


def _by_repetition(table: Sequence[_Score]) -> dict[str, dict[str, _Score]]:
    """Rows with one id are seeds, in the order of the file.

    Raises:
        DataError: not every id stands as often: a duplicate, or a row that is missing.
    """
    counts = Counter(row.id for row in table)
    often = Counter(counts.values())
    usual = min(often, key=lambda times: (-often[times], times))
    seeds: dict[str, dict[str, _Score]] = {}
    so_far: Counter[str] = Counter()
    first: dict[str, str] = {}
    for row in table:
        place = first.setdefault(row.id, row.where)
        if counts[row.id] != usual and so_far[row.id] == counts[row.id] - 1:
            raise DataError(
                f"{row.where}: id {row.id!r} stands in {counts[row.id]} rows (first in {place}), most ids in "
                f"{usual}. An id stands once, or once per seed: then add a column seed."
            )
        seeds.setdefault(str(so_far[row.id]), {})[row.id] = row
        so_far[row.id] += 1
    return seeds


def _constant(table: Sequence[_Score]) -> dict[str, _Score]:
    """The first row of every id, whose cluster and slices all its rows must share."""
    first: dict[str, _Score] = {}
    for row in table:
        one = first.setdefault(row.id, row)
        if one.cluster != row.cluster:
            raise DataError(
                f"{row.where}: id {row.id!r} is in cluster {row.cluster!r}, but in {one.cluster!r} in "
                f"{one.where}. An example has one source document, whatever the seed."
            )
        if one.slices != row.slices:
            raise DataError(
                f"{row.where}: id {row.id!r} is in other slices than in {one.where}. An example is in a "
                "slice with all its seeds, or not at all."
            )
    return first


def stem(path: Path) -> str:
    """The file's name without .gz and without its suffix: the name of the arm."""
    return Path(path.name.removesuffix(".gz")).stem


def rows_of(measurement: Measurement) -> tuple[list[str], list[list[Any]]]:
    """Column names, and a row per example and seed: what `measurement_of` reads back.

    Raises:
        DataError: corpus metrics, which have no score per example.
    """
    if measurement.corpus:
        raise DataError(
            f"{', '.join(measurement.corpus)} has no score per example: save as .json instead."
        )
    scores = {key: np.asarray(values) for key, values in measurement.metrics.items()}
    seeds = max((len(values) for values in scores.values()), default=0)
    if any(len(values) != seeds for values in scores.values()):
        raise DataError(
            "Metrics with different numbers of seeds are no table: save as .json instead."
        )
    several = ["seed"] if seeds > 1 else []
    clustered = ["cluster"] if measurement.clusters is not None else []
    names = ["id", *several, *clustered, *(_header(m, measurement) for m in scores)]
    names += [f"slice:{name}" for name in measurement.slices]
    rows = []
    for seed in range(seeds):
        for i, example in enumerate(measurement.example_ids):
            row = [example, *([seed] if several else [])]
            row += [measurement.clusters[i]] if measurement.clusters is not None else []
            row += [float(values[seed, i]) for values in scores.values()]
            rows.append([*row, *(int(np.asarray(s)[i]) for s in measurement.slices.values())])
    return names, rows


def _header(metric: str, measurement: Measurement) -> str:
    meaning = measurement.declared.get(metric)
    if meaning is None:
        return metric
    way = "higher" if meaning.higher_is_better else "lower"
    points = "" if meaning.points_per_unit is None else f":{meaning.points_per_unit!r}"
    return f"{metric}:{way}{points}"
