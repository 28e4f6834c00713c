"""A run folder as `bem run` leaves it: scores from a seeded generator, real adapters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import bem
from bem.config import ExperimentConfig
from bem.files import write_json
from bem.runs import machine as environment
from bem.runs import verdicts as judging
from bem.runs.folder import RunFolder
from bem.stats import files
from bem.stats.measurement import Measurement
from tests.conftest import make_llama

GAINS = {"s0": 0.0, "v1": 0.14, "v1-random": 0.01, "v3": -0.12, "v4": 0.005}
VARIANTS = {"s0": "s0", "v1": "v1", "v1-random": "v1", "v3": "v3", "v4": "v4"}
ROLES = {"s0": "baseline", "v1-random": "control"}
N = 600


def make_config(output: Path, **changes) -> ExperimentConfig:
    arms = [
        {
            "name": name,
            "adapters": {"variant": VARIANTS[name]}
            | ({"mask": "random"} if "random" in name else {}),
            "role": ROLES.get(name, "candidate"),
            "match": "none" if name in ("s0", "v4") else "parameters",
        }
        for name in GAINS
    ]
    values = {
        "name": "finished",
        "output": str(output),
        "base": "micro",
        "data": {"tasks": ["sig2json", "forms"]},
        "arms": arms,
        "gates": {
            "waived": ["kv_hit", "memory"],
            "regression_margin_points": 3,
            "slice_margin_points": 5,
        },
    }
    return ExperimentConfig.model_validate({**values, **changes})


def make_run(output: Path, **changes) -> RunFolder:
    """s0, a clearly better v1, its random control, a worse v3 and an equal v4; two seeds."""
    config = make_config(output, **changes)
    folder = RunFolder(output / config.name)
    described = {**environment.describe(), "command": "bem run configs/quickstart.yaml"}
    folder.claim(config, {**described, "data": {"forms": "0" * 64}, "base": "1" * 64})
    rng = np.random.default_rng(0)
    easy = rng.random(N)
    for arm in config.arms:
        for seed in config.seeds:
            cell = folder.cell(arm.name, seed)
            cell.path.mkdir(parents=True)
            _measure(cell, arm.name, easy, rng)
            attached = bem.attach(make_llama(), config.adapter_of(arm))
            attached.save(cell.checkpoint)
            cell.finish("key")
    base = rng.lognormal(3, 0.03, 15)
    factors = {"s0": 1.0, "v1": 1.02, "v1-random": 1.02, "v3": 1.31, "v4": 0.97}
    latency = {
        arm: {
            phase: (base * factor * rng.lognormal(0, 0.01, 15)).tolist()
            for phase in ("prefill", "decode")
        }
        for arm, factor in factors.items()
    }
    memory = {"memory_bytes": dict.fromkeys(factors, 2.0**20), "base_memory_bytes": 2.0**24}
    write_json(folder.latency, {"key": "", "latency_ms": latency, **memory})
    layers = {"layers": "layers 1 to 3 of 4, counted from 0"}
    write_json(folder.plans, {arm.name: layers for arm in config.arms})
    judging.judge_run(folder, config, ["em", "f1"])
    return folder


def _measure(cell, name: str, easy: np.ndarray, rng: np.random.Generator) -> None:
    right = (easy < 0.45 + GAINS[name] + rng.normal(0, 0.02, N)).astype(float)
    f1 = np.clip(right + (1 - right) * rng.beta(2, 5, N), 0, 1)
    ids = [f"row{i}" for i in range(N)]
    tasks = np.array(["sig2json", "forms"])[np.arange(N) % 2]
    measurement = Measurement(
        name,
        {"em": right, "f1": f1, "loss": 1.2 - right * rng.random(N)},
        ids,
        clusters=[f"doc{i // 4}" for i in range(N)],
        slices={task: tasks == task for task in ("sig2json", "forms")},
        adapter_parameters=10_000,
        adapter_flops_per_token=20_000 * (1.04 if name == "v1" else 1),
    )
    files.save(measurement, cell.measurement)
    with cell.predictions.open("w") as rows:
        for i in range(N):
            answer = {"id": f"{tasks[i]}/row{i}", "task": tasks[i], "group": f"doc{i // 4}"}
            answer |= {"input": f"def row_{i}(a, b):", "references": [f"row_{i}"]}
            answer |= {"prediction": f"row_{i}" if right[i] else "<b>other</b>"}
            rows.write(json.dumps({**answer, "scores": {"quality": right[i]}}) + "\n")
    noise = rng.normal(0, 0.2, 100)
    losses = 2.5 * np.exp(-np.arange(100) / 40) + 0.8 - GAINS[name] + noise
    with cell.metrics.open("w") as rows:
        for step, loss in enumerate(np.abs(losses), 1):
            rows.write(json.dumps({"step": step, "loss": loss}) + "\n")
