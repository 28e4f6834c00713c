"""A learner beside a server: what it learns on, and how much of the machine it may take."""

from __future__ import annotations

from pydantic import Field

from bem.config.online import OnlineConfig
from bem.config.section import Folder, Section


class LearningConfig(Section):
    """`bem serve --learn`: a process of its own, which learns from the server's feedback."""

    folder: Folder = "runs/online"
    """The learner's: snapshots, candidates, journal. What is there is gone on with."""
    trusted: Folder | None = None
    """JSON Lines of rows that are known to be right, and must not be forgotten."""
    score: str = "em"
    """By which answers are judged: em, f1, chrf of real answers; exact, tokens of the right one."""
    form: str = "text"
    """How answers are compared."""
    variant: str = "s0"
    """Of the adapter that learning begins with, where the store has nothing in use."""
    rank: int = Field(8, ge=1)
    """Of that adapter."""
    threads: int = Field(1, ge=1)
    """Of the learner; answers need the others."""
    niceness: int = Field(10, ge=0, le=19)
    """Of the learner beside the server: 19 learns only when nothing else wants to run."""
    wait_s: float = Field(1.0, gt=0)
    """Seconds between looks at the feedback while there is none."""
    online: OnlineConfig = OnlineConfig()
    """How fast, how far, and what a change must show."""

    @property
    def believes_one_source(self) -> bool:
        """Can feedback of one source alone teach something, and be what a candidate is judged by?"""
        online = self.online
        return online.max_share == 1 and online.events_per_source >= online.trial_events
