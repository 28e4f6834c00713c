"""How a router learned: the report's view of `policy_gradient.Iteration` and `bc.CloningResult`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bem.config import ExperimentConfig
from bem.errors import CheckpointError
from bem.files import read_json
from bem.report import words
from bem.report.plots import routing as plots
from bem.runs.folder import RunFolder, read_jsonl


@dataclass(frozen=True)
class Head:
    """One head of the cloned policy on held-out traces."""

    name: str
    values: list[str]
    """Chance, and `accuracy (majority)` of each seed."""


@dataclass(frozen=True)
class LearningPart:
    """Everything that the templates show of learning. Empty: the run has no such thing."""

    delta: float
    """Largest KL of a step."""
    curves: str
    use: str
    rows: list[list[str]]
    """One per seed: how many iterations, reward, KL, refusals, entropy."""
    remarks: list[str]
    cloning: str
    heads: list[Head]
    seeds: list[int]
    """Of `heads`."""


def part_of(folder: RunFolder, config: ExperimentConfig, options: Sequence[str]) -> LearningPart:
    """Whatever the folder holds; `options`: names of the experts, the base first, [] if there are none."""
    learned, cloned = _learned(folder, config), _cloned(folder, config)
    delta = config.routing.policy_gradient.delta if config.routing else 0.0
    return LearningPart(
        delta=delta,
        curves=plots.learning(learned, delta) if learned else "",
        use=plots.expert_use(learned, options) if options else "",
        rows=[_row(seed, rows) for seed, rows in learned.items()],
        remarks=list(_remarks(learned)),
        cloning=plots.cloning(cloned) if cloned else "",
        heads=_heads(cloned),
        seeds=list(cloned),
    )


Learned = dict[int, list[dict[str, Any]]]
"""Seed -> rows of its metrics.jsonl (`policy_gradient.Iteration`)."""


def _stage(folder: RunFolder, seed: int) -> Path:
    return folder.routing(seed)


def _learned(folder: RunFolder, config: ExperimentConfig) -> Learned:
    files = {seed: _stage(folder, seed) / "ar1-training/metrics.jsonl" for seed in config.seeds}
    return {seed: rows for seed, path in files.items() if (rows := read_jsonl(path))}


def _row(seed: int, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    first, last = rows[0], rows[-1]
    refused = sum(not row["accepted"] for row in rows)
    numbers = [f"{row['reward']:.3f} ± {2 * row['reward_se']:.3f}" for row in (first, last)]
    largest = max(row["kl"] for row in rows)
    ends = [*numbers, f"{largest:.4f}", str(refused), f"{last['entropy']:.2f}"]
    return [words.minus(text) for text in (str(seed), str(len(rows)), *ends)]


def _remarks(learned: Learned) -> Iterator[str]:
    """Refused steps and alarms in words."""
    for seed, rows in learned.items():
        refused = [row for row in rows if not row["accepted"]]
        if refused:
            which = _numbers([row["iteration"] for row in refused])
            yield (
                f"Seed {seed}: {len(refused)} of {len(rows)} steps refused ({which}), the policy stayed as "
                f"it was. The last one: {refused[-1]['reason']}."
            )
        alarms = [row for row in rows if row["alarm"]]
        if alarms:
            which = _numbers([row["iteration"] for row in alarms])
            yield f"Seed {seed}: the policy seems to have collapsed ({which}): {alarms[-1]['alarm']}."


def _numbers(iterations: Sequence[int]) -> str:
    """`iterations 2, 5 to 9`."""
    runs: list[list[int]] = []
    for i in iterations:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    texts = [f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs]
    return f"iteration{'s' * (len(iterations) > 1)} {', '.join(texts)}"


def _cloned(folder: RunFolder, config: ExperimentConfig) -> dict[int, list[dict[str, Any]]]:
    """Seed -> `bc.Accuracy` of each head."""
    paths = {seed: _stage(folder, seed) / "cloning.json" for seed in config.seeds}
    return {
        seed: read_json(path, CheckpointError)["accuracy"]
        for seed, path in paths.items()
        if path.is_file()
    }


def _heads(cloned: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[Head]:
    names = dict.fromkeys(a["head"] for heads in cloned.values() for a in heads)
    by_name = [{a["head"]: a for a in heads} for heads in cloned.values()]
    return [
        Head(
            name,
            [
                next(f"{heads[name]['chance']:.1%}" for heads in by_name if name in heads),
                *(_against_majority(heads.get(name)) for heads in by_name),
            ],
        )
        for name in names
    ]


def _against_majority(a: Mapping[str, Any] | None) -> str:
    if a is None:
        return "–"
    return f"{a['accuracy']:.1%} ({a['majority']:.1%}, {a['decisions']})"
