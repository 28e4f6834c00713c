"""A learner's folder, with a promotion, a rollback and what came after."""

from __future__ import annotations

from pathlib import Path

from bem.config import LearningConfig, OnlineConfig, ServingConfig
from bem.online.told import Scores
from bem.runs.store import Store
from bem.serving.learner import LearnerProcess
from bem.serving.learning import Learning
from tests.online.toys import SKILLS, loop, moves, stream

ROUND = 8


def learn(home: Path, after: int = 0) -> None:
    """Learn skills, promote; the world turns back, and so does the store. Then `after` more turns."""
    zeros = dict.fromkeys(range(SKILLS), 0.0)
    turns = [*stream(48), *stream(24 + after, 3, targets=zeros, start=1000)]
    with loop(home) as made:
        curve = Scores(home / "online", made.event)
        for at in range(0, len(turns), ROUND):
            curve.add(made.round(turns[at : at + ROUND]))
    assert moves(made)[:2] == ["promoted", "rolled back"]


def told_of(home: Path) -> Learning:
    """What a server tells of the learner that has `home`/online; its process does not run."""
    online = OnlineConfig(max_share=1, events_per_source=400)  # as a server without keys needs it
    learning = LearningConfig(folder=str(home / "online"), online=online)
    config = ServingConfig(store=str(home / "store"), feedback=str(home / "f.db"), learn=learning)
    return Learning(LearnerProcess(config), None, Store(home / "store"))
