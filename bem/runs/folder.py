"""What a run leaves on disk.

    runs/NAME/
      config.yaml          the resolved config; a run of that name with another one is refused
      environment.json     versions, machine, seeds, hashes of the data and of the base
      arms/ARM/seed-N/     checkpoint/ metrics.jsonl predictions.jsonl measurement.json cell.json
      evidence.json        facts about the evidence: leaked rows, ranks of the gold passages
      evidence/TASK-KEY.json.gz   what was retrieved for the rows, and their worse variants
      routing/seed-N/      experts and routers; answers/: what arms with one route need not compute twice
      base-answers/        the same of the bare base
      plans.json           rank and adapted layers of each arm
      latency.json         interleaved timings of all arms, and the memory that each adds
      verdicts.json        what was decided, and the sha256 of everything it rests on
      report.html report.md
    runs/store/            the version store that `promote` puts releases into, see `runs.store`

A cell (one arm, one seed) is finished when its `cell.json` exists, which is written last; it holds
a key of everything that the cell's result depends on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bem.config import ExperimentConfig, load
from bem.errors import CheckpointError, ConfigError
from bem.files import json_lines, locked, made_under, read_json, write_json, write_text

NOT_COMPARED = {"output", "device", "threads", "workers", "data.root"}
"""Config keys that may change between two commands on one run: they say where, not what."""
STORE = "store"
"""Name of the version store that lies beside the runs."""
MOST_CHANGES = 12
"""Settings that a refusal lists."""


def read_jsonl(path: Path) -> list[Any]:
    """Rows of one of the run's JSON Lines files; none if the run did not write it.

    Raises:
        DataError: a line that is not JSON; names file and line.
    """
    return [row for _, row in json_lines(path)] if path.is_file() else []


def written(path: Path) -> Path:
    """The path of a file that a finished run has.

    Raises:
        CheckpointError: it is not there.
    """
    if not path.is_file():
        raise CheckpointError(
            f"No {path.name} in {path.parent}. Has the run finished? `bem run` resumes it."
        )
    return path


def checkpoint_kind(checkpoint: Path) -> str:
    """What a checkpoint's manifest says it is: `router`, `peer` (a method of PEFT's), `bare` (the base
    alone) or `adapter`.

    A folder without a manifest is somebody else's adapter: whoever loads it will say so.

    Raises:
        CheckpointError: the manifest is not JSON, or no object.
    """
    path = checkpoint / "manifest.json"
    manifest = read_json(path, CheckpointError) if path.is_file() else {}
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path} holds no manifest: it must be a JSON object.")
    return str(manifest.get("kind", "adapter"))


@dataclass(frozen=True)
class Cell:
    """The folder of one arm and seed."""

    path: Path

    @property
    def route(self) -> Path:
        """Facts for the report about the route of an arm that has one."""
        return self.path / "route.json"

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
        """The cell was finished, under the same conditions, and what was measured is still there."""
        is_there = self.measurement.is_file() and self.predictions.is_file()
        return is_there and made_under(self.path / "cell.json", key)

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

    def routing(self, seed: int) -> Path:
        """Experts, traces and routers of one seed; see `experiments.routing.stages`."""
        return self.path / "routing" / f"seed-{seed}"

    @property
    def tuning(self) -> Path:
        """What was tried for the learning rate of each arm; see `experiments.tuning`."""
        return self.path / "tuning"

    @property
    def plans(self) -> Path:
        """What was decided for each arm before training: layers, rank; see `experiments.plan`."""
        return self.path / "plans.json"

    @property
    def config(self) -> ExperimentConfig:
        """The resolved config that the run was started with."""
        path = self.path / "config.yaml"
        if not path.is_file():
            raise CheckpointError(f"{self.path} is no run: it holds no config.yaml.")
        return load(path)

    def claim(self, config: ExperimentConfig, environment: dict[str, Any]) -> None:
        """Take the folder for this config.

        Raises:
            ConfigError: the folder belongs to another config, other data or another base.
        """
        if self.path.name == STORE:
            raise ConfigError(
                f"a run cannot be called {STORE!r}, as the version store beside the runs is: use another --name."
            )
        resolved = self.path / "config.yaml"
        if not resolved.is_file():
            write_text(resolved, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        elif changes := self._changes(config, environment):
            raise ConfigError(
                f"{self.path} already holds a run of this name with other settings:\n"
                + "\n".join(changes[:MOST_CHANGES])
                + f"\nGive this one a name of its own (--name {config.name}-2), "
                "or delete the folder."
            )
        write_json(self.path / "environment.json", environment)

    def _changes(self, config: ExperimentConfig, environment: dict[str, Any]) -> list[str]:
        """Settings, data and base that differ from those the run was started with, one a line."""
        before = _flat(self.config.model_dump(mode="json"))
        after = _flat(config.model_dump(mode="json"))
        recorded = self.path / "environment.json"
        if recorded.is_file():
            before |= _flat(_inputs(read_json(recorded, CheckpointError)))
            after |= _flat(_inputs(environment))
        return [
            f"  {key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
            for key in sorted(before.keys() | after.keys())
            if key not in NOT_COMPARED and before.get(key) != after.get(key)
        ]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Two commands on one run would write over each other: the second is refused."""
        busy = ConfigError(
            f"Another command is working on {self.path}. Wait, or use another --name."
        )
        with locked(self.path / ".lock", busy):
            yield


def _inputs(environment: dict[str, Any]) -> dict[str, Any]:
    """Hashes of the data and of the base, under the names that a refusal shows."""
    return {"data": {"sha256": environment.get("data")}, "base_sha256": environment.get("base")}


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
