"""Has quality fallen? Calibrated against false alarms, looked at after every score.

    detector = DriftDetector()
    for score in stream:                       # higher is better
        if detector.update(score) is DriftStatus.DRIFT_DETECTED:
            print(detector.alarm.text)         # since when and in which slice
            detector.rearm()

The first `window_size` scores are the reference. After that a CUSUM of block means decides
(`reference.py`); an e-detector, for bounded scores, and a vote of Welch's, Kolmogorov-Smirnov's and
Page-Hinkley's tests are second opinions (`charts.py`): alone they warn. Only falls count: a rise
never alarms. What is promised and what was measured: docs/online.md.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bem.errors import DataError
from bem.online.charts import EDetector, Looks, Vote
from bem.online.reference import BLOCK, LEAST_BLOCKS, Reference, learn
from bem.online.slices import SliceFall, SliceMeans

AT_ONCE = 50_000
"""Scores whose tests are in memory at a time."""
WINDOWS = 20
"""`sensitivity` is the chance of a false alarm within so many windows of stationary scores."""


class DriftStatus(enum.StrEnum):
    """What is known after a score."""

    INSUFFICIENT_DATA = "INSUFFICIENT_DATA"
    """The reference is not complete."""
    STABLE = "STABLE"
    WARNING = "WARNING"
    """A second opinion says drift; the chart that decides does not."""
    DRIFT_DETECTED = "DRIFT_DETECTED"
    """Stays until `rearm` or `reset`."""


@dataclass(frozen=True)
class Alarm:
    """A fall. Events are counted from 1."""

    event: int
    """At which it was found."""
    since: int
    """First score of the fall, as well as that can be told."""
    fall: float
    """Reference mean less the mean since then, in the scores' units."""
    fall_in_sd: float
    agreed: tuple[str, ...]
    """Second opinions that say so too: e_detector, vote."""
    slices: tuple[SliceFall, ...]
    """The surest first; empty if no slice was named."""

    @property
    def text(self) -> str:
        """One sentence for people."""
        sure = [f for f in self.slices if f.p_value is not None and f.p_value < 0.05]
        where = ", ".join(f"{f.name} by {f.fall:.3g}" for f in sure)
        return (
            f"scores fell by {self.fall:.3g} ({self.fall_in_sd:.2g} sd) since score {self.since}, found at "
            f"{self.event}" + (f"; most surely {where}" if where else "")
        )


class DriftDetector:
    """Watches one stream of scores. No clock, no randomness: same scores, same alarms."""

    def __init__(
        self,
        window_size: int = 1000,
        sensitivity: float = 0.01,
        bounds: tuple[float, float] | None = None,
        period: float | None = None,
    ):
        """
        Args:
            window_size: scores in the reference, 200 at least. Where scores have a daily rhythm: a day at least.
            sensitivity: chance of a false alarm within 20 windows of stationary scores: with the defaults,
                one in 2,000,000 scores.
            bounds: lowest and highest possible score. Given, the e-detector joins.
            period: scores in a day, or whatever rhythm they have, if that is known: it is learned from the reference
                and taken off, so that its trough hides no fall. None: a rhythm is allowed for, not taken off.
        Raises:
            ValueError: an argument out of its range.
        """
        if window_size < BLOCK * LEAST_BLOCKS:
            raise ValueError(
                f"window_size must be at least {BLOCK * LEAST_BLOCKS} scores, got {window_size}: from fewer "
                "neither mean nor noise is known well enough to promise anything."
            )
        if not 0 < sensitivity <= 0.5:
            raise ValueError(f"sensitivity is a probability in (0, 0.5], got {sensitivity}.")
        if bounds is not None and not -math.inf < bounds[0] < bounds[1] < math.inf:
            raise ValueError(
                f"bounds must be (lowest, highest), finite and in order; got {bounds}."
            )
        if period is not None and not 2 * BLOCK <= period <= window_size:
            raise ValueError(
                f"period must lie in [{2 * BLOCK}, window_size {window_size}], got {period}: a rhythm must be seen once "
                "whole, and over more than two blocks of scores."
            )
        self.window_size, self.sensitivity, self.period = window_size, sensitivity, period
        self.bounds = None if bounds is None else (float(bounds[0]), float(bounds[1]))
        self.arl = WINDOWS * window_size / sensitivity
        """Scores between two false alarms, on average."""
        self.reset()

    def reset(self) -> None:
        """Forget everything, the reference too: the next scores are the new normal. For a new version."""
        self.events = 0
        self.reference: Reference | None = None
        self.status = DriftStatus.INSUFFICIENT_DATA
        self._slices = SliceMeans()
        self._scores: list[float] = []
        """Of the reference; raw, as the tests compare distributions."""
        self._vote: Vote | None = None
        self._e_detector: EDetector | None = None
        self._restart()

    def rearm(self) -> None:
        """Watch on after an alarm, against the same reference. For after a rollback."""
        self._restart()
        if self.reference is not None:
            self.status = DriftStatus.STABLE

    def _restart(self) -> None:
        self.alarm: Alarm | None = None
        self.statistic = 0.0
        """S of the chart, in block_sd; alarm above `reference.limit`."""
        self._since = self.events + 1
        self._total = 0.0
        self._pending: list[float] = []
        self._names: list[str | None] = []
        self._slices.begin()
        if self._vote is not None:
            self._vote.restart()
        if self._e_detector is not None:
            self._e_detector.restart()

    def update(self, score: float, slice: str | None = None) -> DriftStatus:
        """Take in one score, higher is better.

        Args:
            slice: which part of the traffic it belongs to; alarms say which slices fell.
        Raises:
            ValueError: a score that is not finite or out of bounds; nothing was taken in.
        """
        return self.update_many([score], None if slice is None else [slice])[0]

    def update_many(
        self, scores: Sequence[float] | np.ndarray, slices: Sequence[str | None] | None = None
    ) -> list[DriftStatus]:
        """`update` of many, in order, and much faster; the same statuses to the last bit.

        Returns:
            The status after each score. After an alarm the rest is counted, but not looked at.
        """
        values = np.asarray(scores, dtype=np.float64)
        names: list[str | None] = [None] * len(values) if slices is None else list(slices)
        if values.ndim != 1 or len(names) != len(values):
            raise ValueError(f"{values.shape} scores and {len(names)} slices: one slice per score.")
        self._check(values)
        self._slices.check(names)
        statuses: list[DriftStatus] = []
        while len(statuses) < len(values):
            start = len(statuses)
            end = start + AT_ONCE
            take = self._take_in if self.reference is None else self._watch
            statuses += take(values[start:end], names[start:end])
        return statuses

    def _check(self, values: np.ndarray) -> None:
        low, high = self.bounds or (-math.inf, math.inf)
        wrong = ~(np.isfinite(values) & (values >= low) & (values <= high))
        if wrong.any():
            raise ValueError(
                f"score {values[wrong][0]} is not a finite number in [{low}, {high}]. A judgement that "
                "could not be made is no score: leave it out and count it elsewhere."
            )

    def _take_in(self, values: np.ndarray, names: list[str | None]) -> list[DriftStatus]:
        """Into the reference, which ends at most where the scores do."""
        count = min(self.window_size - len(self._scores), len(values))
        self._slices.learn(names[:count], values[:count].tolist())
        self._scores += values[:count].tolist()
        self.events += count
        statuses = [DriftStatus.INSUFFICIENT_DATA] * count
        if len(self._scores) == self.window_size:
            self._settle(learn(np.array(self._scores), self.arl, self.bounds, self.period))
            self.rearm()
            statuses[-1] = self.status
        return statuses

    def _settle(self, reference: Reference) -> None:
        self.reference = reference
        self._vote = Vote(reference, np.array(self._scores), self.arl)
        if self.bounds is not None:
            self._e_detector = EDetector(reference, self.bounds, self.arl)

    def _watch(self, values: np.ndarray, names: list[str | None]) -> list[DriftStatus]:
        """All of the scores, or as many as end with an alarm."""
        assert self.reference is not None
        if self.alarm is not None:
            self.events += len(values)
            return [self.status] * len(values)
        size, waiting = self.reference.block, len(self._pending)
        line = np.concatenate([self._pending, values])
        names = self._names + names
        whole = len(line) // size
        statuses = self._blocks(line[: whole * size].reshape(whole, size), names)
        done = len(statuses) * size
        statuses = [s for before, s in statuses for s in [before] * (size - 1) + [s]][waiting:]
        if self.alarm is not None:
            self._pending, self._names = [], []
        else:
            self._pending, self._names = line[done:].tolist(), names[done:]
            rest = len(values) - len(statuses)
            statuses += [self.status] * rest
            self.events += rest
        return statuses

    def _blocks(
        self, blocks: np.ndarray, names: list[str | None]
    ) -> list[tuple[DriftStatus, DriftStatus]]:
        """Status before and when each block ends; ends with an alarm."""
        if not len(blocks):
            return []
        assert self.reference is not None and self._vote is not None
        ref, size = self.reference, blocks.shape[1]
        first = self.events - len(self._pending)
        season = ref.expected(first + np.arange(blocks.size)).reshape(blocks.shape)
        sums = (blocks - season).sum(axis=1)
        deviations = (ref.mean - sums / size) / ref.block_sd
        steps = np.minimum(deviations, ref.most) - ref.slack
        looks = self._vote.read(blocks)
        bets = None if self._e_detector is None else self._e_detector.read(blocks)
        sliced = any(name is not None for name in names)
        statuses, self.events = [], first
        for i in range(len(blocks)):
            before, self.events = self.status, self.events + size
            self.statistic = max(0.0, self.statistic + float(steps[i]))
            self._total += float(sums[i])
            if sliced:
                self._slices.add(names[i * size : (i + 1) * size], blocks[i].tolist())
            self.status = self._decide(i, looks, bets)
            statuses.append((before, self.status))
            if self.alarm is not None:  # what was read ahead is not kept
                self._vote.restart()
                if self._e_detector is not None:
                    self._e_detector.restart()
                break
            if self.statistic == 0.0:
                self._since, self._total = self.events + 1, 0.0
                self._slices.begin()
        return statuses

    def _decide(
        self, i: int, looks: Looks, bets: tuple[np.ndarray, np.ndarray] | None
    ) -> DriftStatus:
        assert self.reference is not None and self._vote is not None
        agreed = ("vote",) if self._vote.step(looks, i) else ()
        if (
            bets is not None
            and self._e_detector is not None
            and self._e_detector.step(bets[0][i], bets[1][i])
        ):
            agreed = ("e_detector", *agreed)
        if not self.statistic > self.reference.limit:
            return DriftStatus.WARNING if agreed else DriftStatus.STABLE
        fall = self.reference.mean - self._total / (self.events - self._since + 1)
        in_sd, slices = fall / self.reference.sd, self._slices.falls(self.reference)
        self.alarm = Alarm(self.events, self._since, fall, in_sd, agreed, slices)
        return DriftStatus.DRIFT_DETECTED

    # --- surviving a restart --------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything, as JSON values: a detector restored from it goes on as if nothing had been."""
        return {
            "window_size": self.window_size,
            "sensitivity": self.sensitivity,
            "bounds": self.bounds,
            "period": self.period,
            "events": self.events,
            "status": str(self.status),
            "statistic": self.statistic,
            "since": self._since,
            "total": self._total,
            "scores": list(self._scores),
            "pending": list(self._pending),
            "names": list(self._names),
            "slices": self._slices.state(),
            "reference": None if self.reference is None else asdict(self.reference),
            "alarm": None if self.alarm is None else asdict(self.alarm),
            "page": 0.0 if self._vote is None else self._vote.page,
            "recent": [] if self._vote is None else self._vote.recent.tolist(),
            "evidence": None if self._e_detector is None else self._e_detector.evidence.tolist(),
        }

    def to_json(self) -> str:
        """`state` as text."""
        return json.dumps(self.state(), allow_nan=False)

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> DriftDetector:
        """The inverse of `state`.

        Raises:
            DataError: not a detector's state.
        """
        try:
            names = ("window_size", "sensitivity", "bounds", "period")
            detector = DriftDetector(*(state[name] for name in names))
            detector._scores = list(state["scores"])
            if state["reference"] is not None:
                season = tuple(state["reference"]["season"])
                detector._settle(Reference(**{**state["reference"], "season": season}))
            detector._resume(state)
        except (KeyError, TypeError, ValueError) as failed:
            raise DataError(f"this is no state of a drift detector: {failed!r}.") from None
        return detector

    def _resume(self, state: Mapping[str, Any]) -> None:
        self.events, self.statistic = state["events"], state["statistic"]
        self.status = DriftStatus(state["status"])
        self._since, self._total = state["since"], state["total"]
        self._pending, self._names = list(state["pending"]), list(state["names"])
        self._slices.restore(state["slices"])
        if (alarm := state["alarm"]) is not None:
            falls = tuple(SliceFall(**fall) for fall in alarm["slices"])
            self.alarm = Alarm(**{**alarm, "agreed": tuple(alarm["agreed"]), "slices": falls})
        if self._vote is not None:
            self._vote.page = state["page"]
            self._vote.recent = np.array(state["recent"], dtype=np.float64)
        if self._e_detector is not None:
            self._e_detector.evidence = np.array(state["evidence"])

    @staticmethod
    def from_json(text: str) -> DriftDetector:
        """The inverse of `to_json`."""
        try:
            state = json.loads(text)
        except ValueError as failed:
            raise DataError(f"this is no state of a drift detector: {failed}.") from None
        if not isinstance(state, dict):
            raise DataError(f"this is no state of a drift detector but {type(state).__name__}.")
        return DriftDetector.from_state(state)
