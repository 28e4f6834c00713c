"""What serves, what served before, and the only way from one to the other: through the version store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bem.errors import CheckpointError
from bem.online.desk import Desk
from bem.online.trainee import Trainee, Weights
from bem.online.trial import Trial, in_use, promote, roll_back, write_verdict
from bem.runs.release import read_content
from bem.runs.store import Store

REMEMBERED = 9
"""Versions before the one in use whose weights are kept at hand."""


@dataclass
class Standing:
    """A version, "" for the bare base, with its weights."""

    version: str
    weights: Weights


@dataclass
class Production:
    """The store's version in use, as the loop knows it. Every move can be made twice: the second time
    changes nothing, so that a killed one is simply made again."""

    store: Store
    trainee: Trainee
    desk: Desk
    live: Standing = field(init=False)
    before: list[Standing] = field(default_factory=list)
    """What was in use before, the newest last: where a rollback goes."""
    candidate: Standing | None = None

    def __post_init__(self) -> None:
        self.live = Standing("", self.trainee.born)

    # --- following --------------------------------------------------------------------------------

    def begin(self) -> None:
        """Answer with what is in use.

        Raises:
            CheckpointError: the store is damaged and nothing in it is whole, or holds another kind.
        """
        self.live = self._in_use()

    def follow(self, event: int) -> bool:
        """Has somebody else moved the pointer? Then answer with what is in use now."""
        version = in_use(self.store) if self.store.journal.begun() else ""
        if version is None:  # damaged: the newest whole version before it, else the bare base
            names = [s.version for s in reversed(self.before) if s.version]
            release, problems = roll_back(self.store, names, "what was in use is damaged")
            self.desk.note(event, "damaged", problems=problems)
            version = release.version if release else ""
        if version == self.live.version:
            return False
        self.desk.note(event, "moved by somebody else", version=version, before=self.live.version)
        self.before = [*self.before[-REMEMBERED:], self.live]
        self.live, self.candidate = self._in_use(), None
        return True

    def _in_use(self) -> Standing:
        release = self.store.load_current().release if self.store.journal.begun() else None
        if release is None:
            return Standing("", self.trainee.born)
        with self.store.shelf.folder(release) as folder:
            weights = self.trainee.read(folder)
        if self.trainee.digest(weights) != release.version:
            raise CheckpointError(
                f"release {release.short} loads as version {self.trainee.digest(weights)[:12]}: it was made for "
                "other settings than the learner's."
            )
        return Standing(release.version, weights)

    # --- moving -----------------------------------------------------------------------------------

    def propose(self, number: int, made: Standing) -> None:
        """Keep a candidate in the store, where it is served by nobody yet."""
        self._write(number, made)
        self.store.add(read_content(self.desk.candidate(number)), f"online: candidate {number}")
        self.candidate = made

    def _write(self, number: int, made: Standing) -> None:
        folder = self.desk.candidate(number)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.trainee.save(made.weights, folder)

    def promote(self, trial: Trial, event: int, seed: int) -> None:
        """Put the candidate into use, by its trial's verdict.

        Raises:
            NotAccepted: the trial does not say PROMOTE, or the store serves another base.
        """
        assert self.candidate is not None
        verdict = self.desk.verdict(trial.number)
        write_verdict(verdict, trial, self.candidate.version, self.live.version)
        self._write(trial.number, self.candidate)
        promote(self.store, self.desk.candidate(trial.number), verdict, trial, seed)
        self._noted(event, "promoted", trial)
        self.before = [*self.before[-REMEMBERED:], self.live]
        self.live, self.candidate = self.candidate, None

    def reject(self, trial: Trial, event: int, reason: str) -> None:
        """Put the candidate away; the store keeps it until `bem store collect`."""
        assert self.candidate is not None
        verdict = self.desk.verdict(trial.number)
        write_verdict(verdict, trial, self.candidate.version, self.live.version)
        self._noted(event, "rejected", trial, reason=reason)
        self.candidate = None

    def _noted(self, event: int, what: str, trial: Trial, **more: Any) -> None:
        assert self.candidate is not None
        made = {"number": trial.number, "version": self.candidate.version}
        self.desk.note(event, what, **made, **more, trial=trial.summary())
        self.desk.drop_candidate(trial.number)

    def roll_back(self, event: int, reason: str) -> None:
        """Put the version before into use; where it is damaged the one before that, else the bare base."""
        names = [s.version for s in reversed(self.before)]
        release, problems = roll_back(self.store, names, reason)
        gone, version = self.live.version, release.version if release else ""
        places = [i for i, s in enumerate(self.before) if s.version == version]
        self.live = self.before[places[-1]] if places else self._in_use()
        self.before, self.candidate = self.before[: places[-1]] if places else [], None
        why = {"reason": reason, "problems": problems}
        self.desk.note(event, "rolled back", version=gone, to=version, **why)

    # --- surviving a restart ----------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Names; the weights are in `weights`."""
        return {
            "live": self.live.version,
            "before": [s.version for s in self.before],
            "candidate": None if self.candidate is None else self.candidate.version,
        }

    def weights(self) -> dict[str, dict[str, Any]]:
        """Version -> tensors."""
        standing = [self.live, *self.before, *([self.candidate] if self.candidate else [])]
        return {s.version: dict(s.weights) for s in standing}

    def load_state(self, state: Mapping[str, Any], weights: Mapping[str, Weights]) -> None:
        """Go on where `state` was taken."""
        self.live = Standing(state["live"], weights[state["live"]])
        self.before = [Standing(name, weights[name]) for name in state["before"]]
        name = state["candidate"]
        self.candidate = None if name is None else Standing(name, weights[name])
