"""What is learned from: lessons in a replay reservoir, some of them held out, steps on a shadow.

The learner knows nothing of what serves. It takes lessons in, takes bounded steps, and says what its
shadow weighs; whether that is ever used is for the canary to decide (`bem.online.loop`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bem.config import OnlineConfig
from bem.errors import DataError
from bem.files import sha256_json
from bem.online.replay import Item, Replay
from bem.online.trainee import Lesson, Step, Trainee

Taken = Literal["added", "replaced", "passed", "duplicate", "held out"]
NEWEST = 512
"""Fresh lessons that wait for a step."""


@dataclass
class Counts:
    """What happened so far."""

    lessons: int = 0
    duplicates: int = 0
    held_out: int = 0
    forgotten: int = 0
    steps: int = 0
    discarded: int = 0


class Learner:
    """Reservoirs and a trainee. Everything that it draws comes from generators in its state."""

    def __init__(self, trainee: Trainee, config: OnlineConfig):
        self.trainee, self.config = trainee, config
        self.practice = Replay(config.capacity, config.seed, config.max_share)
        self.held = Replay(config.held_capacity, config.seed + 1, config.max_share)
        self.counts = Counts()
        self._fresh: list[Item] = []
        """Taken into the reservoir, and not yet part of a step."""

    # --- lessons ----------------------------------------------------------------------------------

    def trust(self, items: Sequence[Item]) -> None:
        """Lessons that never leave: every second one is held out."""
        for number, item in enumerate(items):
            (self.held if number % 2 else self.practice).trust(item)

    def take_in(self, item: Item, labelled: bool = True) -> Taken:
        """One lesson: by a hash of its content it is practised on, or held out for good.

        Args:
            labelled: any version's answer to it can be judged; else it can only be practised on.
        """
        self.counts.lessons += 1
        if labelled and is_held_out(item.content, self.config.held_share, self.config.seed):
            self.counts.held_out += 1
            offered = self.held.offer(item)
            return "duplicate" if offered == "duplicate" else "held out"
        offered = self.practice.offer(item)
        if offered == "duplicate":
            self.counts.duplicates += 1
        if offered in ("added", "replaced"):
            self._fresh = [*self._fresh, item][-NEWEST:]
        return offered

    def forget(self, source: str) -> int:
        """Erase every lesson of a source; how many there were."""
        self._fresh = [item for item in self._fresh if item.source != source]
        gone = self.practice.forget(source) + self.held.forget(source)
        self.counts.forgotten += gone
        return gone

    # --- steps ------------------------------------------------------------------------------------

    def can_step(self) -> bool:
        """Are there lessons enough for a batch?"""
        return len(self.practice.items) + len(self.practice.trusted) >= self.config.batch_size

    def step(self) -> Step:
        """One step on fresh lessons, on what is trusted, and on what was drawn from everything that was."""
        wanted = round(self.config.fresh_share * self.config.batch_size)
        fresh, self._fresh = self._one_per_share(wanted)
        try:
            left = self.config.batch_size - len(fresh)
            trusted = round(self.config.trusted_share * self.config.batch_size)
            kept = self.practice.draw_trusted(min(trusted, left))
            drawn = self.practice.draw(left - len(kept))
        except DataError as too_few:  # of sources: nobody may have so much to say
            self.counts.discarded += 1
            return Step(False, float("nan"), 0.0, str(too_few))
        step = self.trainee.learn([item.content for item in (*fresh, *kept, *drawn)])
        self.counts.steps += step.taken
        self.counts.discarded += not step.taken
        return step

    def _one_per_share(self, wanted: int) -> tuple[list[Item], list[Item]]:
        """The oldest fresh lessons, none of them from a source that has its share of the batch already; what
        is left, without those."""
        most = max(1, int(self.config.max_share * self.config.batch_size))
        taken: list[Item] = []
        held: dict[str, int] = {}
        left: list[Item] = []
        for item in self._fresh:
            if len(taken) < wanted and held.get(item.source, 0) < most:
                taken.append(item)
                held[item.source] = held.get(item.source, 0) + 1
            else:
                left.append(item)
        return taken, left

    def sample(self, n: int) -> list[Lesson]:
        """Lessons on which penalties are measured: the newest of the reservoir, then trusted ones."""
        items = [*self.practice.items[-n:], *self.practice.trusted[:n]]
        return [item.content for item in items[:n]]

    # --- surviving a restart ----------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON values; the trainee's tensors are its own matter."""
        return {
            "practice": self.practice.state(),
            "held": self.held.state(),
            "fresh": [vars(item) for item in self._fresh],
            "counts": vars(self.counts),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.practice = Replay.from_state(state["practice"])
        self.held = Replay.from_state(state["held"])
        self._fresh = [Item(**item) for item in state["fresh"]]
        self.counts = Counts(**state["counts"])


def is_held_out(content: Any, share: float, salt: int) -> bool:
    """Same content, same answer, whoever sends it and whenever: it cannot be learned from in disguise."""
    return int(sha256_json([salt, content])[:8], 16) / 2**32 < share
