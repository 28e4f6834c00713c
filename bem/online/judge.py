"""Two versions side by side: both answer the same, and a trial hears what they scored.

replayed    when a candidate is made, at once: what was held out of the stream, and what is trusted
incoming    what is asked from then on, every event once

Neither was learned from. The three are judged apart, so that a gain on one hides no loss on another. On what is
trusted the baseline is the better of the version in use and the one that learning began with: else every
promotion might lose the margin anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bem.config import OnlineConfig
from bem.online.learner import Learner
from bem.online.replay import Item
from bem.online.stream import Turn
from bem.online.trainee import Answer, Trainee, Weights
from bem.online.trial import HELD, INCOMING, TRUSTED, Trial

AT_ONCE = 64
"""Replayed events between two looks."""


class Judge:
    """See the module's docstring."""

    def __init__(self, trainee: Trainee, learner: Learner, config: OnlineConfig):
        self.trainee, self.learner, self.config = trainee, learner, config
        self.live: dict[str, dict[str, float]] = {}
        """Stratum -> id -> score of the version in use: it is asked once."""
        self.first: dict[str, float] = {}
        """Of the version that learning began with, on what is trusted."""

    def strata(self) -> list[str]:
        """What can be replayed; []: nothing, and no candidate can be judged."""
        held = self.learner.held
        return [n for n, there in ((HELD, held.is_fair), (TRUSTED, held.trusted)) if there]

    def replay(self, trial: Trial, live: Weights, candidate: Weights) -> None:
        """Ask both about what is held back, until every stratum is decided. One that is not decided within
        `replay_events` leaves the trial stuck: more of the same says nothing new."""
        try:
            for name in trial.strata:
                self._stratum(name, trial, live, candidate)
        except Exception as failed:  # whatever it was: a version that raises must not serve
            trial.canary.broken(f"the candidate failed: {type(failed).__name__}: {failed}")

    def _stratum(self, name: str, trial: Trial, live: Weights, candidate: Weights) -> None:
        held = self.learner.held
        items = (held.draw_trusted if name == TRUSTED else held.draw_offered)(
            self.config.replay_events
        )
        scores: dict[str, float] = {}
        for at in range(0, len(items), AT_ONCE):
            some = items[at : at + AT_ONCE]
            self._score(some, candidate, scores)
            baseline = self._baseline(name, some, live)
            for item in some:
                if trial.decided(name):
                    return
                if (old := baseline.get(item.id)) is not None:
                    trial.compare(name, old, scores.get(item.id))
        if not trial.decided(name):
            trial.stuck = f"undecided on what is {name.replace('_', ' ')}: {trial.words(name)}"

    def _baseline(self, name: str, items: Sequence[Item], live: Weights) -> Mapping[str, float]:
        known = self.live.setdefault(name, {})
        if name != TRUSTED:
            self._score(items, live, known)
            return known
        pool = self.learner.held.trusted
        self._score(pool, live, known)
        now = {i.id: known[i.id] for i in pool if i.id in known}
        self.first = {k: s for k, s in self.first.items() if k in now} or now
        return max(self.first, now, key=lambda scores: sum(scores.values()))

    def _score(self, items: Sequence[Item], weights: Weights, known: dict[str, float]) -> None:
        """Of those that are not known yet; what cannot be judged stays unknown."""
        new = {i.id: self.trainee.turn_of(i.content, i.id) for i in items if i.id not in known}
        if new:
            answers = self.trainee.answers(weights, list(new.values()), None)
            known |= {k: a.score for k, a in zip(new, answers, strict=True) if a.score is not None}

    def incoming(
        self,
        trial: Trial,
        turns: Sequence[Turn],
        answers: Sequence[Answer],
        other: Weights,
        watching: bool,
    ) -> None:
        """Ask the other version what was asked. Where only a score is known another answer has none: such
        events would compare like with like.

        Args:
            answers: of the version in use.
            other: the candidate, or while `watching` the version before.
        Raises:
            Whatever the other version raises.
        """
        most = self.config.events_per_source
        scored = [i for i, a in enumerate(answers) if a.counts and turns[i].labelled]
        chosen = [i for i in scored if trial.counts(turns[i].source, most)]
        asked = self.trainee.answers(other, [turns[i] for i in chosen], None) if chosen else []
        for i, answer in zip(chosen, asked, strict=True):
            pair = (answers[i].score, answer.score)
            old, new = reversed(pair) if watching else pair  # the version in use is judged then
            if old is not None:
                trial.compare(INCOMING, old, new)

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return {"live": self.live, "first": self.first}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.live = {name: dict(scores) for name, scores in state["live"].items()}
        self.first = dict(state["first"])
