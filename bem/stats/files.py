"""Measurements as files: our JSON, and tables of scores from anywhere else.

What a file is says its content, whatever its name: our JSON, CSV (comma, semicolon or tab), JSON Lines or a
JSON array; UTF-8 or UTF-16 with its mark; plain or gzipped. A table has one row per example and seed:

    id          required (or doc_id); rows with the same id are seeds of one example
    seed        optional; rows of one seed together (default: order of appearance)
    cluster     optional (or group); source document
    slice:NAME  optional; 0 or 1, membership in a named slice
    em, f1 ...  a metric of the registry; numbers, or true and false
    acc:higher:100, cost:lower    any other metric: which way is better[: points in one unit]

    id,cluster,em,acc:higher:100
    q1,doc7,1,0.5

Samples of lm-eval (`--log_samples`) are read as they are, and pandas' nameless index is left out.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bem.errors import DataError
from bem.files import read_text, write_bytes
from bem.stats.columns import canonical
from bem.stats.measurement import Measurement, RouterFacts
from bem.stats.score_table import measurement_of, rows_of
from bem.stats.scores import Metric
from bem.stats.tables import csv_rows, json_rows, write_csv, write_json_lines

FORMAT = "bem-measurement-1"
NOT_IN_TABLES = (
    *(
        "corpus",
        "latency_ms",
        "adapter_memory_bytes",
        "adapter_parameters",
        "adapter_flops_per_token",
    ),
    *("kv_hits", "kv_held", "kv_needed", "router", "meta"),
)
"""Fields for which a table has no columns."""
RETIRED = {"memory_bytes"}
"""Fields of older files that nothing looks at any more: memory with the base's weights in it."""


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
        DataError: another format, an unknown or missing field, a wrong shape or type; names the field.
    """
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise DataError(
            f'{where} is not a measurement (it has no "format": "{FORMAT}"), and no table of scores: that has '
            "one JSON object per example, with an id (pandas: df.to_json(path, orient='records', "
            "lines=True); lm-eval: --log_samples). Averages are not enough."
        )
    names = {f.name for f in fields(Measurement)}
    unknown = sorted(map(str, set(values) - names - RETIRED - {"format"}))
    missing = [k for k in ("name", "metrics", "example_ids") if values.get(k) is None]
    if unknown or missing:
        raise DataError(f"{where}: unknown fields {unknown}, missing fields {missing}.")
    given = {k: v for k, v in values.items() if k in names and v is not None}
    try:
        given["declared"] = {k: Metric(**m) for k, m in given.get("declared", {}).items()}
        if "router" in given:
            given["router"] = RouterFacts(**given["router"])
        return Measurement(**given)
    except (TypeError, AttributeError, DataError) as error:
        raise DataError(f"{where}: {error}") from None


def save(measurement: Measurement, path: str | Path) -> Path:
    """Write what the name's suffix says, whole or not at all; gzipped if it ends in .gz.

    .json holds everything; .csv, .tsv and .jsonl the scores alone (see `NOT_IN_TABLES`).

    Raises:
        DataError: another suffix, or scores that are no table (corpus metrics).
    """
    path = Path(path)
    kind = kind_of(path)
    if kind == "json":
        text = json.dumps(to_dict(measurement), separators=(",", ":"))
    elif kind == "jsonl":
        text = write_json_lines(*rows_of(measurement))
    else:
        text = write_csv(*rows_of(measurement), delimiter="\t" if kind == "tsv" else ",")
    content = text.encode()
    write_bytes(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def kind_of(path: Path) -> Literal["json", "jsonl", "csv", "tsv"]:
    """What `save` writes under this name; JSON if the name has no suffix.

    Raises:
        DataError: a suffix that says something else, or a folder.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a file.")
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    match suffix:
        case "" | ".json":
            return "json"
        case ".jsonl" | ".ndjson":
            return "jsonl"
        case ".csv":
            return "csv"
        case ".tsv":
            return "tsv"
    raise DataError(f"{path}: scores are written as .json, .jsonl, .csv or .tsv, not as {suffix}.")


def load(
    path: str | Path, declared: Mapping[str, Metric] | None = None, ignore: Sequence[str] = ()
) -> Measurement:
    """Read a measurement, whatever the file is called (see above).

    Args:
        declared: meaning of metrics that neither the registry nor the table's header tells.
        ignore: columns (of a measurement: metrics, `slice:NAME`) to leave out where there are any; those
            that were are listed in `meta["ignored"]`.
    Raises:
        DataError: names the file, and the line, the id and the column where there are any.
    """
    path = Path(path)
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty: it has no rows.")
    rows = json_rows(text, path) if text.lstrip()[0] in "{[" else csv_rows(text, path)
    if isinstance(rows, Mapping):
        return _ignoring(from_dict(rows, str(path)), ignore)
    return measurement_of(rows, path, dict(declared or {}), ignore)


def _ignoring(measurement: Measurement, ignore: Sequence[str]) -> Measurement:
    if not ignore:
        return measurement
    names = {canonical(name) for name in ignore}
    parts: dict[str, dict[str, Any]] = {
        "metrics": {k: v for k, v in measurement.metrics.items() if k not in names},
        "corpus": {k: v for k, v in measurement.corpus.items() if k not in names},
        "slices": {k: v for k, v in measurement.slices.items() if f"slice:{k}" not in names},
    }
    present = {*measurement.metrics, *measurement.corpus}
    present |= {f"slice:{name}" for name in measurement.slices}
    ignored = {"ignored": sorted(names & present)} if names & present else {}
    return replace(measurement, **parts, meta={**measurement.meta, **ignored})


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
