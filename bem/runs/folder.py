"""What a run leaves on disk, and the pointer that says which adapter is in use.

    runs/NAME/
      config.yaml          the resolved config; a run of that name with another one is refused
      environment.json     versions, machine, seeds, hashes of the data and of the base
      arms/ARM/seed-N/     checkpoint/ metrics.jsonl predictions.jsonl measurement.json cell.json
      evidence.json        facts about the evidence: leaked rows, ranks of the gold passages
      evidence/TASK-KEY.json.gz   what was retrieved for the rows, and their worse variants
      latency.json         interleaved timings of all arms
      verdicts.json        what was decided, and the sha256 of everything it rests on
      report.html report.md
    runs/promoted.json     the pointer that `promote` moves

A cell (one arm, one seed) is finished when its `cell.json` exists, which is written last; it holds
a key of everything that the cell's result depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bem.config import ExperimentConfig, parse
from bem.errors import CheckpointError, ConfigError

NOT_COMPARED = {"output", "device", "threads", "workers", "data.root"}
"""Config keys that may change between two commands on one run: they say where, not what."""


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: a reader, or a full disk, never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file of the run; CheckpointError if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"No {path.name} in {path.parent}. Has the run finished? `bem run` resumes it."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Delete it and run again.") from None


def read_jsonl(path: Path) -> list[Any]:
    """Rows of a JSONL file; empty if there is none."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """sha256 of a file; CheckpointError if there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the run is not complete.") from None


@dataclass(frozen=True)
class Cell:
    """The folder of one arm and seed."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.jsonl"

    @property
    def measurement(self) -> Path:
        return self.path / "measurement.json"

    def is_finished(self, key: str) -> bool:
        """The cell was finished, and under the same conditions."""
        mark = self.path / "cell.json"
        return mark.is_file() and read_json(mark)["key"] == key

    def finish(self, key: str) -> None:
        write_json(self.path / "cell.json", {"key": key})


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; see the module's docstring for what lies where."""

    path: Path

    @property
    def latency(self) -> Path:
        return self.path / "latency.json"

    @property
    def evidence(self) -> Path:
        """What was retrieved for the tasks' rows."""
        return self.path / "evidence"

    @property
    def verdicts(self) -> Path:
        return self.path / "verdicts.json"

    def cell(self, arm: str, seed: int) -> Cell:
        return Cell(self.path / "arms" / arm / f"seed-{seed}")

    @property
    def config(self) -> ExperimentConfig:
        """The resolved config that the run was started with."""
        path = self.path / "config.yaml"
        if not path.is_file():
            raise CheckpointError(f"{self.path} is no run: it holds no config.yaml.")
        return parse(ExperimentConfig, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))

    def claim(self, config: ExperimentConfig, environment: dict[str, Any]) -> None:
        """Take the folder for this config, or refuse it because another one lives there.

        Raises:
            ConfigError: the folder holds a run of another config, other data or another base.
        """
        known = self.path / "config.yaml"
        if known.is_file():
            before = _flat(self.config.model_dump(mode="json"))
            after = _flat(config.model_dump(mode="json"))
            recorded = self.path / "environment.json"
            if recorded.is_file():
                was = read_json(recorded)
                before |= _flat({"data": {"sha256": was["data"]}, "base_sha256": was["base"]})
                after |= _flat(
                    {"data": {"sha256": environment["data"]}, "base_sha256": environment["base"]}
                )
            changes = [
                f"  {key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
                for key in sorted(before.keys() | after.keys())
                if key not in NOT_COMPARED and before.get(key) != after.get(key)
            ]
            if changes:
                raise ConfigError(
                    f"{self.path} already holds a run of this name with other settings:\n"
                    + "\n".join(changes[:12])
                    + f"\nGive this one a name of its own (--name {config.name}-2), "
                    "or delete the folder."
                )
        else:
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            write_text(known, text)
        write_json(self.path / "environment.json", environment)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Two commands on one run would write over each other: the second is refused."""
        import fcntl

        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"Another command is working on {self.path}. Wait, or use another --name."
                ) from None
            yield


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; lists of named entries are keyed by name."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        items = ((v.get("name", i), v) for i, v in enumerate(value))
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
