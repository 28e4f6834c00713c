"""What a server tells of learning, read from the learner's folder, the feedback log and the store's ledger: for
the dashboard and for Prometheus. Nothing here is decided by it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from bem.errors import BemError
from bem.online.desk import Desk
from bem.online.told import Journal, candidates, scores
from bem.runs.release import SHORT
from bem.runs.store import Store
from bem.serving.feedback import Ledger
from bem.serving.learner import LearnerProcess

log = logging.getLogger(__name__)

MOVES = ("candidate", "promoted", "rejected", "rolled back", "kept", "drift")
"""Words of the journal that are counted, and marked on the curve."""
MARKS = 60
ENTRIES = 30
FRESH_S = 1.0
"""What was read is told again for so long, however many ask."""
RECENT = 20
"""Points of the curve whose mean is the score of late."""


class Learning:
    """The learner of a server, as it is told."""

    def __init__(
        self,
        process: LearnerProcess | None,
        feedback: Ledger | None,
        store: Store | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.process, self.feedback, self.store, self.clock = process, feedback, store, clock
        options = None if process is None else process.config.learn
        self.desk = None if options is None else Desk(Path(options.folder))
        self._journal = None if self.desk is None else Journal(self.desk.journal)
        self._problem = ""
        self._last: dict[str, Any] = {"on": False}
        self._read_at = float("-inf")
        self._lock = threading.Lock()

    def read(self) -> dict[str, Any]:
        """Everything, from the files: not on an event loop. What cannot be read is a problem that is told."""
        with self._lock:
            if self.clock() - self._read_at >= FRESH_S:
                self._last, self._read_at = self._told(), self.clock()
            return self._last

    def _told(self) -> dict[str, Any]:
        told: dict[str, Any] = {"on": self.desk is not None, "ledger": self._ledger()}
        process, desk, journal = self.process, self.desk, self._journal
        if desk is None or process is None or journal is None:
            return told
        told |= {"alive": process.alive, "restarts": process.restarts, "ended": process.ended}
        return told | self._learner(desk, journal)

    def _learner(self, desk: Desk, journal: Journal) -> dict[str, Any]:
        status, last, problem = None, 0, ""
        try:
            status = desk.status() if (desk.folder / "status.json").is_file() else None
            last = self.feedback.log.last() if self.feedback else 0
        except BemError as failed:  # paths are for the log, not for every key
            problem = (
                "the learner's folder or the feedback cannot be read: the server's log says why"
            )
            if self._problem != str(failed):
                log.error("%s", failed)
            self._problem = str(failed)
        journal.look()
        marks = [_mark(entry) for entry in journal.entries if entry["what"] in MOVES]
        return {
            "paused": desk.paused,
            "problem": problem,
            "status": status,
            "waiting": max(0, last - status["sequence"]) if status else last,
            "moves": {word: journal.counts[word] for word in MOVES},
            "passed_over": journal.counts["passed over"],
            "scores": scores(desk.folder),
            "marks": marks[-MARKS:],
            "candidates": candidates(journal.entries, status and status["trial"]),
        }

    def _ledger(self) -> list[dict[str, Any]]:
        """The newest moves of the version store, the newest first."""
        if self.store is None:
            return []
        try:
            moves = self.store.journal.ledger().moves()[-ENTRIES:]
        except (BemError, OSError):
            return []  # there is none yet; a damaged one is told as a problem of the store
        kept = ("number", "at", "event", "version", "reason")
        return [{name: getattr(move, name) for name in kept} for move in reversed(moves)]

    # --- for Prometheus ---------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """What was read last, as metrics; none where there is no learner."""
        told = self._last
        if not told["on"]:
            return
        yield _gauge("up", "1: the learner's process runs.", told["alive"])
        yield _counter(
            "restarts", "Learners that were started because one had ended.", told["restarts"]
        )
        yield _gauge("paused", "1: somebody paused learning.", told["paused"])
        yield _gauge("waiting_events", "Feedback that was not taken in yet.", told["waiting"])
        yield _counter("passed_over", "Feedback that could not be used.", told["passed_over"])
        moves = CounterMetricFamily("bem_online_moves", "What was done.", labels=["move"])
        for word, number in told["moves"].items():
            moves.add_metric([word.replace(" ", "_")], number)
        yield moves
        if told["status"] is not None:
            yield from _of_status(told["status"], told["scores"])


def _of_status(status: dict[str, Any], curve: list[dict[str, Any]]) -> Iterator[Metric]:
    counts, trial = status["counts"], status["trial"]
    yield _counter("events", "Answered requests that were taken in.", status["event"])
    yield _counter("steps", "Steps that the shadow took.", counts["steps"])
    yield _counter(
        "discarded_steps", "Steps that were not finite or too long.", counts["discarded"]
    )
    yield _gauge("lessons", "Lessons that are practised on.", status["practice"])
    yield _gauge("held_out", "Events that are never learned from.", status["held_out"])
    yield _gauge("watching", "1: a promotion is being watched.", status["watching"])
    yield _gauge("snapshot_problems", "Snapshots that are damaged.", len(status["problems"]))
    reference, recent = status["drift_reference"], curve[-RECENT:]
    n = sum(point["n"] for point in recent)
    mean = sum(point["mean"] * point["n"] for point in recent) / n if n else None
    yield _gauge("score", "Mean score of late, of the version in use.", mean)
    yield _gauge("score_reference", "Mean score when the drift detector began.", reference)
    values = GaugeMetricFamily(
        "bem_online_e_value", "Evidence on trial: 1/alpha decides.", labels=["metric", "hypothesis"]
    )
    for metric in trial["metrics"] if trial else []:
        values.add_metric([metric["metric"], "not_worse"], metric["e_not_worse"])
        values.add_metric([metric["metric"], "worse"], metric["e_worse"])
    yield values


def _gauge(name: str, about: str, value: float | None) -> Metric:
    """None: nothing is known yet, and no number is given for it."""
    known = None if value is None else float(value)
    return GaugeMetricFamily(f"bem_online_{name}", about, value=known)


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(f"bem_online_{name}", about, value=float(value))


def _mark(entry: dict[str, Any]) -> dict[str, Any]:
    version = entry.get("to") if entry["what"] == "rolled back" else entry.get("version")
    why = entry.get("reason") or entry.get("text") or ""
    return {"event": entry["event"], "what": entry["what"], "version": (version or "")[:SHORT], "why": why}  # fmt: skip
