"""A run folder with arms that have a route, as `bem run` leaves it: scores, conversations and curves
from a seeded generator, written by the records of the code that writes them; real routers and peers."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import bem
from bem.config import ExperimentConfig
from bem.config.arm import ROUTERS
from bem.experiments.measuring.answers import DECLARED
from bem.experiments.routing.arms import PEERS
from bem.experts.subspace import Loss
from bem.files import write_json, write_text
from bem.routing.explain import Explained
from bem.routing.mount import blank_expert, mount
from bem.runs import machine as environment
from bem.runs import verdicts as judging
from bem.runs.folder import RunFolder
from bem.stats import files
from bem.stats.measurement import Measurement, RouterFacts
from bem.training.bc import Accuracy, CloningResult
from bem.training.policy_gradient import Iteration
from tests.conftest import make_llama

N = 360
EXPERTS = {"json": ["forms/json"], "intent": ["forms/intent"], "qa": ["qa"]}
SKILLS = ["forms/json", "forms/intent", "qa"]
GAINS = {
    "s0": 0.0, "ar1": 0.11, "ar0": 0.06, "fitted": 0.07, "oracle": 0.2, "gold": 0.19, "linear": 0.05, "encoder": 0.03,
    "single": -0.15, "random": -0.2, "wrong": -0.3, "xlora": 0.06, "arrow": 0.02,
}  # fmt: skip
"""Share of right answers above the baseline's."""
PACES = {"xlora": (2.2, 17.0), "arrow": (1.4, 1.8), "s0": (1.0, 1.0)}
"""Prefill and decode times by the baseline's; of the others 1.02 and 1.05."""
TALK = (
    "User: Answer in JSON. please put the song on my gym list | for the road\nAssistant: {\"int",
    "ent\": \"AddToPlaylist\", \"slots\": {\"playlist\": \"gym\"}}\nUser: Name the intent. book a table",
    "BookRestaurant\nUser: Daniel went back to the kitchen. Mary moved to the garden. Where is Mary?",
    "garden\nUser: add this tune to the list for the long and winding road to the north\nAssistant:",
    "{\"intent\": \"AddToPlaylist\"}",
)  # fmt: skip


def make_config(output: Path, arms: tuple[str, ...] = tuple(GAINS), **changes) -> ExperimentConfig:
    candidates = ROUTERS
    values: dict[str, Any] = {
        "name": "routed",
        "output": str(output),
        "base": "micro",
        "data": {"tasks": ["forms", "doc2name"], "conversations": {"turns": 3}},
        "arms": [{"name": "s0", "role": "baseline"}]
        + [
            {"name": a, "route": a, "role": "candidate" if a in candidates else "control"}
            for a in arms
            if a != "s0"
        ],
        "routing": {"experts": EXPERTS, "expert_rank": 2},
        "gates": {"n_bootstrap": 500, "waived": ["slices"]},
    }
    return ExperimentConfig.model_validate({**values, **changes})


def make_run(output: Path, arms: tuple[str, ...] = tuple(GAINS), **changes) -> RunFolder:
    """Every route beside s0; two seeds."""
    config = make_config(output, arms, **changes)
    folder = RunFolder(output / config.name)
    folder.claim(config, {**environment.describe(), "data": {"forms": "0" * 64}, "base": "1" * 64})
    rng = np.random.default_rng(0)
    easy = rng.random(N)
    mounted = mount(make_llama(), [blank_expert(make_llama(), name, 2) for name in EXPERTS])
    saved = mounted.save(folder.path / "routing/seed-0/experts")
    for arm in config.arms:
        for seed in config.seeds:
            cell = folder.cell(arm.name, seed)
            cell.path.mkdir(parents=True)
            files.save(measurement(arm.name, easy, rng), cell.measurement)
            _save_checkpoint(arm.route, saved, cell.checkpoint)
            if arm.route not in (None, "xlora", "arrow"):
                write_json(cell.route, facts(arm.route, seed))
    for seed in config.seeds:
        stage = folder.path / f"routing/seed-{seed}"
        write_json(stage / "cloning.json", asdict(cloning(seed)))
        lines = [json.dumps(asdict(i)) + "\n" for i in iterations(seed)]
        if "ar1" in arms:
            write_text(stage / "ar1-training/metrics.jsonl", "".join(lines))
    write_json(folder.latency, latency([arm.name for arm in config.arms], rng))
    judging.judge_run(folder, config, ["quality"])
    return folder


def measurement(name: str, easy: np.ndarray, rng: np.random.Generator) -> Measurement:
    sticky = np.arange(N) // 3 % 3 == 0
    tasks = np.array(SKILLS)[np.arange(N) % len(SKILLS)]
    lost = 0.25 * (sticky & (name in ("linear", "encoder", "s0", "random")))
    right = (easy < 0.5 + GAINS[name] - lost + rng.normal(0, 0.05, N)).astype(float)
    xlora = name == "xlora"
    return Measurement(
        name,
        {"quality": right, "loss": 1.4 - right * rng.random(N)},
        [f"row{i}" for i in range(N)],
        clusters=[f"doc{i // 2}" for i in range(N)],
        slices={**{t: tasks == t for t in SKILLS}, "sticky": sticky},
        declared=DECLARED,
        adapter_parameters=10_000,
        adapter_flops_per_token=20_000,
        kv_hits=np.full(N, 0.0 if xlora else 90.0),
        kv_held=np.full(N, 0.0 if xlora else 90.0),
        kv_needed=np.full(N, 90.0),
        router=RouterFacts(plan_lengths=[1, 2, 1]) if name in ROUTERS else None,
    )


def facts(route: str, seed: int) -> dict[str, Any]:
    """What `route.json` holds."""
    if route in ROUTERS:
        found = asdict(cloning(seed)) if route == "ar0" else {}
        return {**found, "interference": disturbed(), "conversations": conversations(seed)}
    known: dict[str, Any] = {"agrees_with_gold": {"gold": 1.0, "wrong": 0.0}.get(route, 0.5)}
    if route == "single":
        known["expert"] = "qa"
    if route in ("linear", "encoder"):
        known |= {"accuracy_per_turn": 0.75, "trained_on": 300, "agrees_with_gold_sticky": 0.125}
    return known


def disturbed() -> dict[str, Any]:
    """What `interference_of` returns: nothing is lost by the labels, 1 and 3 % under the router."""
    found: dict[str, Any] = {"limit": 0.02}
    for kind, losses in (("mounted", (1.0, 1.0, 1.0)), ("routed", (1.01, 0.99, 1.03))):
        rows = [Loss(name, 1.0, loss) for name, loss in zip(EXPERTS, losses, strict=True)]
        rows = [{**asdict(row), "growth": row.growth} for row in rows]
        found[kind] = {"passed": kind == "mounted", "experts": rows}
    return found


def conversations(seed: int) -> dict[str, Any]:
    """Answers of three skills; the third is always under `qa`, the others err now and then."""
    return {
        "skills": SKILLS,
        "options": ["base", *EXPERTS],
        "use": [[0, 30 + seed, 10, 0], [4, 6, 30, 0], [0, 0, 0, 40]],
        "accuracy": 0.8 + 0.02 * seed,
        "flip_rate": 0.25,
        "plan_length": 1.25,
        "longest_plan": 3,
        "owner": {skill: name for name, owned in EXPERTS.items() for skill in owned},
        "shown": [
            {
                "id": f"forms/talk-{i}",
                "skills": ["forms/intent", "qa", "forms/json"],
                "chunks": talk(),
            }
            for i in range(2)
        ],
    }


def talk() -> list[dict[str, Any]]:
    """Five chunks, three of which begin an answer; the last one under the wrong expert."""
    plans = [("base", False), ("intent", True), ("qa", True), ("qa", False), ("qa", True)]
    chunks = []
    for number, ((expert, turn), text) in enumerate(zip(plans, TALK, strict=True), 1):
        p = dict.fromkeys(["base", *EXPERTS], 0.01) | {expert: 0.97}
        chunk = Explained(
            chunk=number, start=64 * number - 64, stop=64 * number, turn=turn, expert=expert,
            rank=2 if turn else 1, strength=1.5, chunks_left=0, fade=0.25 if number == 4 else 0.0,
            why="the policy prefers what is in force", probabilities=p, gain=0.1,
        )  # fmt: skip
        chunks.append({**asdict(chunk), "text": text})
    return chunks


def iterations(seed: int, count: int = 15) -> list[Iteration]:
    """A reward that rises; one refused step and, with seed 1, a collapse."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(1, count + 1):
        refused, collapsed = i == 4, seed == 1 and i in (9, 10, 13)
        use = rng.dirichlet([2, 4, 6, 8]) if not collapsed else np.array([0.01, 0.01, 0.02, 0.96])
        found.append(
            Iteration(
                iteration=i, reward=float(0.4 + 0.01 * i + rng.normal(0, 0.01)), reward_se=0.02,
                scores={"quality": 0.4}, accepted=not refused, kl=0.0 if refused else 0.008,
                surrogate=0.0 if refused else 0.02, entropy=2.5 - 0.1 * i,
                reason="no candidate kept KL <= 0.01" if refused else "", explained_variance=0.4,
                flip_rate=0.2, plan_length=1.3, longest_plan=3,
                expert_use=[round(float(u), 4) for u in use],
                alarm="qa governs 96% of the chunks" if collapsed else "", episodes=64, seconds=1.0,
            )
        )  # fmt: skip
    return found


def cloning(seed: int) -> CloningResult:
    rows = [("expert", 0.8, 0.25, 0.5), ("span", 0.7, 1 / 3, 0.65), ("rank", 0.9, 0.5, 0.9)]
    rows += [("strength", 0.6, 1 / 3, 0.55), ("expert at answers", 0.85, 0.25, 0.4)]
    accuracy = [Accuracy(h, a - 0.02 * seed, c, m, 120) for h, a, c, m in rows]
    return CloningResult(accuracy, [(1.0, 1.1), (0.8, 0.9)], [(0.5, 0.6)], 900, 120)


def latency(arms: list[str], rng: np.random.Generator) -> dict[str, Any]:
    base = rng.lognormal(3, 0.03, 15)
    times = {
        arm: {
            phase: (base * PACES.get(arm, (1.02, 1.05))[k] * rng.lognormal(0, 0.005, 15)).tolist()
            for k, phase in enumerate(("prefill", "decode"))
        }
        for arm in arms
    }
    return {"key": "", "latency_ms": times, "adapter_memory_bytes": dict.fromkeys(arms, 300e6)}


def _save_checkpoint(route: str | None, saved: Path, to: Path) -> None:
    if route is None:
        bem.attach(make_llama(), variant="s0", rank=2).save(to)
    elif route in ("xlora", "arrow"):
        experts = {name: saved / "experts" / name for name in EXPERTS}
        PEERS[route](make_llama(), experts).save(to)
    else:
        shutil.copytree(saved, to)
