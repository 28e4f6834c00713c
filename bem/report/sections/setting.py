"""Where a run took place, and how to repeat it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bem.config import ExperimentConfig
from bem.runs.folder import RunFolder
from bem.stats.measurement import Measurement


def lead(config: ExperimentConfig, base: Measurement) -> str:
    """What was compared, on what."""
    tasks = [task if isinstance(task, str) else task.name for task in config.data.tasks]
    groups = len(set(base.clusters)) if base.clusters is not None else base.n
    return (
        f"Run {config.name}: {len(config.arms)} arms on {config.base}, tasks {', '.join(tasks)}; "
        f"{base.n:,} held-out examples from {groups:,} source documents, "
        f"{len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}, "
        f"{_training(config)}.{_trained_otherwise(config)}"
    )


def _training(config: ExperimentConfig) -> str:
    """`200 training steps each`; experts are trained together, for steps of their own."""
    if not config.trains:
        return "all of them as they were saved"
    steps = f"{'up to ' if config.training.patience else ''}{config.training.steps} training steps"
    if not config.trains_experts or not any(arm.route for arm in config.arms):
        return (
            f"{steps} for each adapter" if any(a.is_bare for a in config.arms) else f"{steps} each"
        )
    training = config.expert_training
    together = f"{'up to ' if training.patience else ''}{training.steps}"
    return f"{steps} for each adapter, {together} for all experts together"


def _trained_otherwise(config: ExperimentConfig) -> str:
    """` Trained otherwise: v1 (learning_rate 0.001 instead of 0.01).`; empty: all arms alike."""
    shared = config.training.model_dump()
    named = {arm.name: config.training_of(arm) for arm in config.arms}
    if config.trains_experts and any(arm.route for arm in config.arms):
        named["the experts"] = config.expert_training
    changes = {
        name: [
            f"{key} {value} instead of {shared[key]}"
            for key, value in own.model_dump().items()
            if value != shared[key]
        ]
        for name, own in named.items()
    }
    told = "; ".join(f"{name} ({', '.join(each)})" for name, each in changes.items() if each)
    return f" Trained otherwise: {told}." if told else ""


def environment_rows(environment: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name and value of everything in `environment.json`, nested names joined."""
    for key, value in environment.items():
        name = f"{prefix} {key}".strip()
        if isinstance(value, dict):
            yield from environment_rows(value, name)
        elif key != "command":
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def repeat(folder: RunFolder, config: ExperimentConfig, environment: Mapping[str, Any]) -> str:
    """The commands that repeat a run."""
    again = f"bem run {folder.path}/config.yaml --name {config.name}-again"
    lines = [environment["command"]] if environment.get("command") else []
    lines.append(f"# or, from the resolved config beside this report:\n{again}" if lines else again)
    if environment.get("revision"):
        lines.insert(0, f"git checkout {environment['revision'].rstrip('+')}")
    return "\n".join(lines)
