"""The whole loop: answer, take feedback in, learn, watch, put on trial, promote, roll back.

    with Loop(folder, store, trainee, config) as loop:
        loop.go(turns)                    # or round by round: loop.round(some)

What serves is only ever moved through the version store. Every move is written down before it is made,
so that a kill at any instant is gone on from with the same bits: the same answers, the same lessons,
the same candidates, the same moves. No clock is asked; order is the order of the turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bem.config import OnlineConfig
from bem.online.desk import KEPT, Desk
from bem.online.drift import DriftDetector, DriftStatus
from bem.online.judge import Judge
from bem.online.learner import Learner
from bem.online.production import Production, Standing
from bem.online.replay import Item
from bem.online.stream import Turn
from bem.online.trainee import Answer, Trainee
from bem.online.trial import Trial, finite
from bem.runs.store import Store

FISHER_LESSONS = 64


@dataclass(frozen=True)
class Round:
    """What one round did."""

    event: int
    """Events so far, counting this round's."""
    scores: tuple[float | None, ...]
    """Of the version in use, one per request."""
    version: str
    """That answered; "": the bare base."""
    drift: str
    moved: str
    """promote | reject | rollback; "": nothing moved."""


class Loop:
    """One learner on one stream. The store says what serves; the loop follows it."""

    def __init__(self, folder: str | Path, store: Store, trainee: Trainee, config: OnlineConfig):
        """
        Args:
            folder: the learner's; what is there is gone on with.
            store: whose version in use answers, and where candidates go.
            trainee: stands on the store's base.
        """
        self.desk, self.config, self.trainee = Desk(Path(folder)), config, trainee
        self.production = Production(store, trainee, self.desk)
        self.learner = Learner(trainee, config)
        self.drift = DriftDetector(config.drift_window, config.sensitivity, (0.0, 1.0))
        self.event, self.rounds, self.last_candidate = 0, 0, 0
        self.sequence = 0
        """Last event of a feedback log that was taken in."""
        self.trial: Trial | None = None
        """Of the candidate beside the version in use; while `watching`, of that beside the one before."""
        self.watching = False
        self.pending: dict[str, str] | None = None
        """A move that was decided and may not be made yet."""
        self._draws = np.random.Generator(np.random.PCG64([config.seed, 17]))
        self.judge = Judge(trainee, self.learner, config)
        self._open = ExitStack()

    # --- opening and closing ----------------------------------------------------------------------

    def __enter__(self) -> Loop:
        """Be the one writer, and go on where the newest whole snapshot was taken.

        Raises:
            OnlineError: another writer, no whole snapshot, or another learner's folder.
            CheckpointError: the store is damaged and nothing in it is whole.
        """
        self._open.enter_context(self.desk.writing())
        try:
            self._resume()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *failed: Any) -> None:
        try:
            if failed[0] is None:
                self.save()
        finally:
            self._open.close()

    def go(
        self, turns: Sequence[Turn], on_round: Callable[[Round], None] | None = None
    ) -> list[Round]:
        """The rest of a stream.

        Args:
            turns: the whole stream from its first turn on, also when it is gone on with.
        """
        done, size = [], self.config.round_size
        for at in range(self.rounds * size, len(turns), size):
            done.append(self.round(turns[at : at + size]))
            if on_round:
                on_round(done[-1])
        return done

    def trust(self, turns: Sequence[Turn]) -> None:
        """Turns with right answers that are known to be good: what the version in use must not forget.
        Half are practised on, half are held out. After the first round it does nothing."""
        if self.rounds:
            return
        answers = self.trainee.answers(self.production.live.weights, turns, None)
        pairs = zip(turns, answers, strict=True)
        self.learner.trust([Item(t.row.id, t.source, a.lesson) for t, a in pairs if t.row and a.lesson])  # fmt: skip

    # --- one round --------------------------------------------------------------------------------

    def round(self, turns: Sequence[Turn], upto: int | None = None) -> Round:
        """Answer some requests, and do everything that follows from what is said of the answers.

        Args:
            upto: number of the last event of a log that these turns come from; see `catch_up`.
        """
        if self.production.follow(self.event):
            self._start_over()
            self.judge.first = {}  # learning begins anew with what somebody put into use
        erased = [turn.erase for turn in turns if turn.erase is not None]
        for source in erased:
            self.desk.note(self.event, "erased", lessons=self.learner.forget(source))
        asked = [turn for turn in turns if turn.row is not None]
        live = self.production.live
        answers = self.trainee.answers(live.weights, asked, self._draws) if asked else []
        self.event += len(asked)
        status = self._watch_scores(asked, answers)
        self._on_trial(asked, answers)
        self._learn(asked, answers)
        self.rounds += 1
        self.sequence = self.sequence if upto is None else upto
        moved = self._settle()  # the last thing: a move is made between two rounds
        if erased:
            self.save(kept=1)  # older snapshots still know them
        elif self.rounds % self.config.snapshot_every == 0:
            self.save()
        return Round(self.event, tuple(a.score for a in answers), live.version, str(status), moved)

    def _watch_scores(self, turns: Sequence[Turn], answers: Sequence[Answer]) -> DriftStatus:
        pairs = [
            (a.score, t.slice or None) for a, t in zip(answers, turns, strict=True) if a.counts
        ]
        before = self.drift.status
        if pairs:
            self.drift.update_many([float(s or 0.0) for s, _ in pairs], [name for _, name in pairs])
        status, alarm = self.drift.status, self.drift.alarm
        if status is DriftStatus.DRIFT_DETECTED and before is not status and alarm is not None:
            self.desk.note(self.event, "drift", text=alarm.text, alarm=asdict(alarm))
            if self._is_to_blame():
                self._decide("rollback", f"drift within the watch: {alarm.text}")
                self.drift.rearm()
            else:
                self.drift.reset()  # the world changed: what comes is the new normal, and is learned
        return status

    def _is_to_blame(self) -> bool:
        """Is it the newest version that made scores fall? Not if the one before does no better."""
        if not self.watching or self.trial is None:
            return False
        means = [m.difference for m in self.trial.canary.status().metrics]
        return all(m is None or m < 0 for m in means)

    # --- trials -----------------------------------------------------------------------------------

    def _on_trial(self, turns: Sequence[Turn], answers: Sequence[Answer]) -> None:
        if self.trial is None or self.pending or self.trial.canary.decision != "HOLD":
            return
        other = self.production.before[-1] if self.watching else self.production.candidate
        assert other is not None
        try:
            self.judge.incoming(self.trial, turns, answers, other.weights, self.watching)
        except Exception as failed:  # whatever it was: a version that raises must not serve
            self._failed(f"{type(failed).__name__}: {failed}")

    def _failed(self, what: str) -> None:
        """The other version raised: a candidate is rejected; the one before is no longer there to watch."""
        assert self.trial is not None
        if self.watching:
            self._end_watch(f"the version before failed: {what}")
        else:
            self.trial.canary.broken(f"the candidate failed: {what}")

    # --- moves ------------------------------------------------------------------------------------

    def _settle(self) -> str:
        """Do what was decided; what that was."""
        if self.trial is not None and not self.pending:
            decision, reason = self.trial.canary.decision, self.trial.canary.reason
            since = self.event - self.trial.number
            if self.watching and decision == "ROLLBACK":
                self._decide("rollback", reason)
            elif self.watching and since >= self.config.watch_events:
                self._end_watch(f"not shown to be worse than the version before in {since} events")
            elif not self.watching and decision != "HOLD":
                self._decide("promote" if decision == "PROMOTE" else "reject", reason)
            elif not self.watching and (
                why := self.trial.undecided(since, self.config.trial_events)
            ):
                self._decide("reject", why)
        return self._carry_out() if self.pending else ""

    def _end_watch(self, reason: str) -> None:
        assert self.trial is not None
        trial = self.trial.summary()
        self.desk.note(self.event, "kept", version=self.production.live.version, reason=reason, trial=trial)  # fmt: skip
        self.trial, self.watching = None, False
        self.drift.reset()

    def _decide(self, move: str, reason: str) -> None:
        self.pending = {"move": move, "reason": reason}

    def _carry_out(self) -> str:
        """Make the pending move. A kill before its end repeats it: every part changes nothing the second time."""
        assert self.pending is not None
        self.save()
        move, reason = self.pending["move"], self.pending["reason"]
        if move == "promote":
            self._promote()
        elif move == "reject":
            assert self.trial is not None
            shown = self.trial.canary.decision != "HOLD"
            self.production.reject(self.trial, self.event, reason)
            self.trial, self.last_candidate = None, self.event
            if shown:  # an undecided one may yet become better: its shadow goes on
                self._start_over()
        else:
            self.production.roll_back(self.event, reason)
            self._start_over()
        self.pending = None
        self.save()
        return move

    def _promote(self) -> None:
        assert self.trial is not None
        self.production.promote(self.trial, self.event, self.config.seed)
        lessons = self.learner.sample(FISHER_LESSONS)
        self.trainee.accept(self.production.live.weights, lessons)
        self.watching = self.config.watch_events > 0
        self.trial = Trial.watch(self.event, self.config) if self.watching else None
        self.judge.live = {}

    def _start_over(self) -> None:
        """The shadow goes back to what is in use; no candidate, no watch."""
        self.trial, self.watching, self.production.candidate = None, False, None
        self.judge.live, self.last_candidate = {}, self.event
        self.trainee.start_from(self.production.live.weights)

    # --- learning ---------------------------------------------------------------------------------

    def _learn(self, turns: Sequence[Turn], answers: Sequence[Answer]) -> None:
        for turn, answer in zip(turns, answers, strict=True):
            if turn.row is not None and answer.lesson is not None:
                item = Item(turn.row.id, turn.source, answer.lesson)
                self.learner.take_in(item, labelled=turn.labelled)
        if self.desk.paused:
            return
        for _ in range(self.config.steps_per_round if self.learner.can_step() else 0):
            step = self.learner.step()
            if not step.taken:
                self.desk.note(self.event, "discarded", reason=step.reason)
        due = self.event - self.last_candidate >= self.config.candidate_every
        if due and self.trial is None and not self.pending and self.learner.counts.steps:
            strata = self.judge.strata()
            if strata:  # else nothing is held back yet by which it could be judged
                self._make_candidate(strata)

    def _make_candidate(self, strata: Sequence[str]) -> None:
        self.last_candidate, weights = self.event, self.trainee.weights()
        if not finite(weights):
            self.desk.note(
                self.event, "discarded", reason="the shadow is not finite: it begins anew"
            )
            self._start_over()
            return
        made = Standing(self.trainee.digest(weights), weights)
        if made.version == self.production.live.version:
            return
        self.production.propose(self.event, made)
        self.trial = Trial.of(self.event, self.config, strata)
        self.desk.note(self.event, "candidate", number=self.event, version=made.version)
        self.judge.replay(self.trial, self.production.live.weights, weights)

    # --- surviving a restart ----------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must agree on."""
        settings = self.config.model_dump(mode="json", exclude={"snapshot_every"})
        return {"online": settings, "trainee": self.trainee.fingerprint()}

    def save(self, kept: int = KEPT) -> None:
        """A snapshot of everything, and the summary for people; of older ones all but `kept` go."""
        plain = {
            **{name: getattr(self, name) for name in _PLAIN},
            "production": self.production.state(),
            "trial": self.trial.state() if self.trial else None,
            "learner": self.learner.state(),
            "drift": self.drift.state(),
            "draws": self._draws.bit_generator.state,
            "judge": self.judge.state(),
            "journal": self.desk.journal_size(),
        }
        state = {
            "fingerprint": json.dumps(self.fingerprint()),
            "plain": json.dumps(plain),
            "weights": self.production.weights(),
            "trainee": self.trainee.state(),
        }
        self.desk.save(self.rounds, state, kept)
        self.desk.show(self.status())

    def _resume(self) -> None:
        state = self.desk.newest(self.fingerprint())
        if state is None:
            self.desk.cut_journal(0)
            self.production.begin()
            self.trainee.start_from(self.production.live.weights)
            self.save()
            return
        plain = json.loads(state["plain"])
        for name in _PLAIN:
            setattr(self, name, plain[name])
        self.production.load_state(plain["production"], state["weights"])
        self.trial = None if plain["trial"] is None else Trial.from_state(plain["trial"])
        self.learner.load_state(plain["learner"])
        self.drift = DriftDetector.from_state(plain["drift"])
        self._draws.bit_generator.state = plain["draws"]
        self.judge.load_state(plain["judge"])
        self.trainee.load_state(state["trainee"])
        self.desk.cut_journal(plain["journal"])
        if self.pending:
            self._carry_out()

    def status(self) -> dict[str, Any]:
        """For people: see `bem online status`."""
        learner = self.learner
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            **self.production.state(),
            "trial": self.trial.summary() if self.trial else None,
            "drift": str(self.drift.status),
            "drift_reference": None if self.drift.reference is None else self.drift.reference.mean,
            "counts": vars(learner.counts),
            "practice": len(learner.practice.items) + len(learner.practice.trusted),
            "held_out": len(learner.held.items) + len(learner.held.trusted),
            "paused": self.desk.paused,
            "problems": self.desk.problems,
        }


_PLAIN = ("event", "rounds", "sequence", "last_candidate", "watching", "pending")
