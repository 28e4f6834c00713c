"""A trainee without a model: one number per skill, right where it is within .5 of what is asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from bem.config import OnlineConfig
from bem.errors import CheckpointError
from bem.online.loop import Loop
from bem.online.stream import Turn
from bem.online.trainee import Answer, Step
from bem.runs.store import Store
from bem.training.example import Example
from tests.runs.contents import BASE, Clock

SKILLS = 4
CONFIG = OnlineConfig(
    learning_rate=0.2,
    batch_size=8,
    round_size=8,
    steps_per_round=2,
    max_share=0.2,
    held_share=0.2,
    candidate_every=40,
    margin=0.1,
    tolerance=0.1,
    trial_events=200,
    watch_events=80,
    drift_window=200,
    snapshot_every=3,
)


class Toy:
    """Its version is the digest of its numbers; its checkpoint a text file."""

    kind = "adapter"

    def __init__(self, rate: float = 0.2):
        self.rate, self.asked = rate, []
        self.w, self.accepted = torch.zeros(SKILLS), torch.zeros(SKILLS)
        self.poison = None
        """What happens to the shadow in the next steps."""

    @property
    def born(self):
        return {"w": torch.zeros(SKILLS)}

    def fingerprint(self):
        return {"toy": self.rate}

    def answers(self, weights, turns, draws):
        found = []
        for turn in turns:
            skill, target = map(float, turn.row.references[0].split())
            value = float(weights["w"][int(skill)])
            if not np.isfinite(value):
                raise FloatingPointError("this version is broken")
            said = turn.scores.get("said")
            score = float(abs(value - target) < 0.5) if said is None else said
            found.append(Answer(score, {"skill": skill, "target": target, "id": turn.row.id}))
        return found

    def turn_of(self, lesson, id):
        return Turn(row(id, int(lesson["skill"]), lesson["target"]), id)

    def weights(self):
        return {"w": self.w.clone()}

    def start_from(self, weights):
        self.w, self.accepted = weights["w"].clone(), weights["w"].clone()

    def accept(self, weights, lessons):
        self.accepted = weights["w"].clone()

    def learn(self, lessons):
        before = self.w.clone()
        for lesson in lessons:
            k = int(lesson["skill"])
            self.w[k] += self.rate * (lesson["target"] - self.w[k])
        if self.poison is not None:
            self.w = self.poison(self.w)
        if not self.w.isfinite().all() and self.poison is None:
            self.w = before
            return Step(False, float("nan"), 0.0, "not finite")
        return Step(True, 0.0, float((self.w - before).norm()))

    def digest(self, weights):
        return hashlib.sha256(weights["w"].numpy().tobytes()).hexdigest()

    def save(self, weights, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(weights["w"].tolist())
        (folder / "w.json").write_text(text)
        manifest = {
            "kind": "adapter",
            "base": BASE,
            "version": {"digest": self.digest(weights)},
            "files": {"w.json": hashlib.sha256(text.encode()).hexdigest()},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))

    def read(self, folder):
        if not (folder / "w.json").is_file():
            raise CheckpointError(f"{folder} holds no numbers")
        return {"w": torch.tensor(json.loads((folder / "w.json").read_text()))}

    def state(self):
        return {"w": self.w.clone(), "accepted": self.accepted.clone()}

    def load_state(self, state):
        self.w, self.accepted = state["w"], state["accepted"]


def row(id: str, skill: int, target: float) -> Example:
    return Example(id, f"skill {skill}", (f"{skill} {target}",))


def stream(n: int, seed: int = 0, sources: int = 60, targets=None, start: int = 0) -> list[Turn]:
    """Skills drawn anew for each turn; targets: skill -> what is right, 1 by default."""
    rng = np.random.default_rng(seed)
    targets = targets or dict.fromkeys(range(SKILLS), 1.0)
    found = []
    for i in range(start, start + n):
        skill = int(rng.integers(SKILLS))
        user = f"u{int(rng.integers(sources))}"
        found.append(Turn(row(f"t{i}", skill, targets[skill]), user, f"skill {skill}"))
    return found


def loop(folder: Path, toy: Toy | None = None, **changes) -> Loop:
    config = OnlineConfig(**{**CONFIG.model_dump(), **changes})
    store = Store(folder / "store", by="the learner", clock=Clock())
    return Loop(folder / "online", store, toy or Toy(), config)


def moves(made: Loop) -> list[str]:
    words = ("promoted", "rejected", "rolled back", "kept", "drift", "discarded", "damaged")
    return [e["what"] for e in made.desk.entries() if e["what"] in words]
