"""Measurements as files: our JSON, and plain CSV or JSONL tables from anywhere else.

Table: one row per example and seed. Columns (CSV) or keys (JSONL):

    id          required; rows with the same id are seeds of one example
    seed        optional; rows of one seed together (default: order of appearance)
    cluster     optional; source document
    slice:NAME  optional; 0 or 1, membership in a named slice
    em, f1 ...  a metric of the registry
    acc:higher:100, cost:lower    any other metric: which way is better[: points in one unit]

    id,cluster,em,acc:higher:100
    q1,doc7,1,0.5
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from bem.errors import DataError
from bem.stats.measurement import Measurement, RouterFacts
from bem.stats.scores import METRICS, Metric

FORMAT = "bem-measurement-1"


def to_dict(measurement: Measurement) -> dict[str, Any]:
    """Plain lists, numbers and strings."""
    values = {f.name: getattr(measurement, f.name) for f in fields(Measurement)}
    values["declared"] = {k: asdict(m) for k, m in measurement.declared.items()}
    if measurement.router is not None:
        values["router"] = asdict(measurement.router)
    return {"format": FORMAT, **{k: _plain(v) for k, v in values.items()}}


def from_dict(values: Mapping[str, Any], where: str = "measurement") -> Measurement:
    """The inverse of `to_dict`.

    Raises:
        DataError: another format, an unknown or missing field, a wrong shape; names the field.
    """
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise DataError(f'{where} is not a measurement: it has no "format": "{FORMAT}".')
    known = {f.name for f in fields(Measurement)}
    unknown = sorted(set(values) - known - {"format"})
    missing = [k for k in ("name", "metrics", "example_ids") if values.get(k) is None]
    if unknown or missing:
        raise DataError(f"{where}: unknown fields {unknown}, missing fields {missing}.")
    given = {k: v for k, v in values.items() if k in known and v is not None}
    try:
        given["declared"] = {k: Metric(**m) for k, m in given.get("declared", {}).items()}
        if "router" in given:
            given["router"] = RouterFacts(**given["router"])
        return Measurement(**given)
    except (TypeError, AttributeError) as error:
        raise DataError(f"{where}: {error}") from None
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def save(measurement: Measurement, path: str | Path) -> Path:
    """Write JSON, gzipped if the name ends in .gz; whole or not at all."""
    path = Path(path)
    text = json.dumps(to_dict(measurement), separators=(",", ":")).encode()
    part = path.with_name(path.name + ".part")
    part.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    part.replace(path)
    return path


def load(path: str | Path, declared: Mapping[str, Metric] | None = None) -> Measurement:
    """Read a measurement: .json, .csv or .jsonl, each also .gz.

    Args:
        declared: meaning of metrics that neither the registry nor the table's header tells.
    Raises:
        DataError: names the file, and the line and column where there is one.
    """
    path = Path(path)
    text = _read(path)
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind == "json":
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from None
        return from_dict(values, str(path))
    rows = {"csv": _csv_rows, "jsonl": _jsonl_rows}.get(kind)
    if rows is None:
        raise DataError(f"{path}: unknown kind of file; expected .json, .csv or .jsonl (or .gz).")
    return _from_rows(rows(path, text), path, dict(declared or {}))


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}") from None


def _csv_rows(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), restkey="(too many)")
    return [(f"{path}:{reader.line_num}", dict(row)) for row in reader]


def _jsonl_rows(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number} must be an object with an id, got {line[:40]!r}.")
        rows.append((f"{path}:{number}", row))
    return rows


def _from_rows(
    rows: list[tuple[str, dict[str, Any]]], path: Path, declared: dict[str, Metric]
) -> Measurement:
    if not rows:
        raise DataError(f"{path} has no rows.")
    columns = list(rows[0][1])
    if "id" not in columns:
        raise DataError(f"{path} has no column id; it has: {', '.join(map(str, columns))}.")
    slices = [c for c in columns if c.startswith("slice:")]
    scores = [c for c in columns if c not in ("id", "seed", "cluster", *slices)]
    names = {c: _declare(path, c, declared) for c in scores}
    table: dict[str, dict[str, list[float]]] = {}  # seed -> id -> numbers
    clusters: dict[str, str] = {}
    for where, row in rows:
        example = str(_cell(where, row, "id"))
        seeds_so_far = sum(example in part for part in table.values())
        seed = str(row.get("seed", seeds_so_far))
        part = table.setdefault(seed, {})
        if example in part:
            raise DataError(f"{where}: id {example!r} appears twice in seed {seed}.")
        part[example] = [_number(where, row, c) for c in (*scores, *slices)]
        if "cluster" in columns:
            clusters[example] = str(_cell(where, row, "cluster"))
    return _assembled(path, table, clusters, [names[c] for c in scores], slices, declared)


def _assembled(
    path: Path, table: dict[str, dict[str, list[float]]], clusters: dict[str, str],
    names: list[str], slices: list[str], declared: dict[str, Metric],
) -> Measurement:  # fmt: skip
    ids = list(next(iter(table.values())))
    for seed, part in table.items():
        if set(part) != set(ids):
            raise DataError(f"{path}: seed {seed} has {len(part)} of {len(ids)} examples.")
    cube = np.array([[part[i] for i in ids] for part in table.values()]).reshape(
        len(table), len(ids), len(names) + len(slices)
    )
    return Measurement(
        name=path.name.partition(".")[0],
        metrics={name: cube[:, :, j] for j, name in enumerate(names)},
        example_ids=ids,
        clusters=[clusters[i] for i in ids] if clusters else None,
        slices={s[6:]: cube[0, :, len(names) + j] for j, s in enumerate(slices)},
        declared={k: m for k, m in declared.items() if k in names},
    )


def _declare(path: Path, column: str, declared: dict[str, Metric]) -> str:
    """The metric's name; `name:higher[:points]` declares it."""
    name, *rest = column.split(":")
    if not rest:
        if name not in METRICS and name not in declared:
            raise DataError(
                f"{path}: column {name!r} is no metric I know ({', '.join(METRICS)}). Say which "
                f"way is better: '{name}:higher', '{name}:lower', or '{name}:higher:100' with the "
                "points in one unit."
            )
        return name
    if rest[0] not in ("higher", "lower") or len(rest) > 2:
        raise DataError(f"{path}: column {column!r} must look like '{name}:higher:100'.")
    try:
        points = float(rest[1]) if len(rest) == 2 else None
    except ValueError:
        raise DataError(f"{path}: column {column!r}: {rest[1]!r} is not a number.") from None
    declared[name] = Metric(rest[0] == "higher", points)
    return name


def _cell(where: str, row: dict[str, Any], column: str) -> Any:
    value = row.get(column)
    if value is None or value == "":
        raise DataError(f"{where}: column {column!r} is missing.")
    return value


def _number(where: str, row: dict[str, Any], column: str) -> float:
    value = _cell(where, row, column)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"{where}: column {column!r} is {value!r}, not a number.") from None


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
