"""What was tried for the learning rate of every arm, and the step at which its training was stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bem.config import ExperimentConfig
from bem.errors import CheckpointError
from bem.files import read_json
from bem.runs.folder import RunFolder


@dataclass(frozen=True)
class TunedRow:
    """One arm's search."""

    name: str
    """Of an arm, or `experts`."""
    cells: list[str]
    """Validation losses at each rate, after ever more steps."""
    chosen: str
    """Rate; "" where none was searched for."""
    kept: str
    """Step whose weights were kept, for each seed."""


@dataclass(frozen=True)
class TuningPart:
    """The table."""

    rates: list[str]
    rungs: list[int]
    """Steps after which trials were compared; empty: only the step was chosen."""
    rows: list[TunedRow]


def part_of(folder: RunFolder, config: ExperimentConfig) -> TuningPart | None:
    """What was chosen on the rows set aside; None: nothing was."""
    if config.data.validation_rows is None:
        return None
    rates = list(config.tuning.rates) if config.tuning else []
    own = [arm.name for arm in config.arms if arm.has_adapter]
    trained = [(name, _manifests(folder, config, name)) for name in own]
    if any(arm.route for arm in config.arms):
        trained.append(("experts", _expert_manifests(folder, config)))
    rows = [_row(folder, name, rates, manifests) for name, manifests in trained]
    rungs = config.tuning.rungs if config.tuning else []
    return TuningPart([f"{rate:g}" for rate in rates], rungs, rows)


def _row(
    folder: RunFolder, name: str, rates: Sequence[float], manifests: Sequence[Mapping[str, Any]]
) -> TunedRow:
    path = folder.tuning / f"{name}.json"
    search = read_json(path, CheckpointError) if path.is_file() else {}
    losses: dict[float, list[str]] = {rate: [] for rate in rates}
    for trial in search.get("trials", ()):
        loss = trial["loss"]
        losses[trial["rate"]].append("diverged" if loss is None else f"{loss:.3f}")
    steps = [str(manifest["step"]) for manifest in manifests if "step" in manifest]
    chosen = f"{search['chosen']:g}" if "chosen" in search else ""
    return TunedRow(
        name, [" → ".join(tried) for tried in losses.values()], chosen, ", ".join(steps)
    )


def _manifests(folder: RunFolder, config: ExperimentConfig, arm: str) -> list[dict[str, Any]]:
    cells = [folder.cell(arm, seed) for seed in config.seeds]
    return [_extra(read_json(c.checkpoint / "manifest.json", CheckpointError)) for c in cells]


def _expert_manifests(folder: RunFolder, config: ExperimentConfig) -> list[dict[str, Any]]:
    paths = [folder.routing(seed) / "experts" / "manifest.json" for seed in config.seeds]
    return [_extra(read_json(path, CheckpointError)) for path in paths if path.is_file()]


def _extra(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return dict(manifest.get("extra") or {})
