"""One candidate on trial: beside the version in use, on what comes in, what was held out, what is trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bem.config import OnlineConfig
from bem.errors import BemError, CheckpointError, NotAccepted
from bem.files import sha256_file, write_json
from bem.online.canary import Canary, Margins
from bem.online.trainee import Weights
from bem.runs.release import Grounds, Release, read_content
from bem.runs.store import BASE, Store

INCOMING, HELD, TRUSTED = "incoming", "held_out", "trusted"
FORMAT = "bem-canary-1"
NEVER = -0.999999
"""A margin that nothing can show: a gain of the whole range."""


@dataclass
class Trial:
    """A canary, and whose events it has counted."""

    number: int
    """Event after which the candidate was made."""
    canary: Canary
    sources: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    """Events of sources that had counted often enough."""
    stuck: str = ""
    """Why it will never be decided; "": it may be."""

    @staticmethod
    def of(number: int, config: OnlineConfig, strata: Sequence[str]) -> Trial:
        """Of a candidate beside the version in use, on what comes in and on what is replayed."""
        margins = Margins(config.margin, config.tolerance)
        metrics = {f"{config.metric} {name}": margins for name in (INCOMING, *strata)}
        return Trial(number, Canary(metrics, config.alpha))

    @staticmethod
    def watch(number: int, config: OnlineConfig) -> Trial:
        """Of a version in use beside the one before, from an event on. It can only end in a rollback."""
        margins = Margins(NEVER, config.tolerance)
        return Trial(number, Canary({f"{config.metric} {INCOMING}": margins}, config.alpha))

    def counts(self, source: str, most: int) -> bool:
        """Does one more event of this source count? Then it has been counted."""
        if self.sources[source] >= most:
            self.skipped += 1
            return False
        self.sources[source] += 1
        return True

    @property
    def strata(self) -> list[str]:
        """What is replayed."""
        return [name for m in self.canary.metrics if (name := m.split()[-1]) != INCOMING]

    def compare(self, name: str, baseline: float, candidate: float | None) -> None:
        """One event of what comes in or of a stratum; a score that the candidate lacks is a rollback."""
        metric = self._metric(name)
        scores = {} if candidate is None else {metric: candidate}
        self.canary.paired({metric: baseline}, scores, only=(metric,))

    def decided(self, name: str) -> bool:
        """Is everything known that this stratum was asked for?"""
        return self.canary.decision != "HOLD" or self.canary.shown(self._metric(name))

    def words(self, name: str) -> str:
        """What is known of it."""
        return self.canary.words(self._metric(name))

    def _metric(self, name: str) -> str:
        return next(m for m in self.canary.metrics if m.split()[-1] == name)

    def undecided(self, events: int, most: int) -> str:
        """Why nobody should wait any longer; "": there is hope.

        Args:
            events: since it began, judged or not.
            most: that a trial may take.
        """
        if self.stuck:
            return self.stuck
        if self.canary.bets_on(self._metric(INCOMING)) < most and events < 2 * most:
            return ""
        return f"undecided {events} events after it was made: {self.canary.reason}"

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "number": self.number,
            "canary": self.canary.state(),
            "sources": dict(self.sources),
            "skipped": self.skipped,
            "stuck": self.stuck,
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Trial:
        """The inverse of `state`."""
        canary = Canary.from_state(state["canary"])
        sources = Counter(state["sources"])
        return Trial(state["number"], canary, sources, state["skipped"], state["stuck"])

    def summary(self) -> dict[str, Any]:
        """For people."""
        status = self.canary.status()
        return {
            "decision": status.decision,
            "reason": status.reason,
            "events": self.canary.bets_on(self._metric(INCOMING)),
            "skipped": self.skipped,
            "metrics": [asdict(m) for m in status.metrics],
        }


def write_verdict(path: Path, trial: Trial, candidate: str, baseline: str) -> None:
    """What the candidate was judged by, without anything that a clock says: the same trial, the same bytes."""
    verdict = trial.canary.verdict(candidate, baseline)
    content = {
        "format": FORMAT,
        "candidate": candidate,
        "baseline": baseline,
        "verdict": verdict.to_dict(),
        "canary": trial.canary.state(),
        "number": trial.number,
        "sources": len(trial.sources),  # how many: who they are is nobody's business for ever
    }
    write_json(path, content)


def promote(store: Store, folder: Path, verdict: Path, trial: Trial, seed: int) -> Release:
    """Put a candidate into use, by the verdict of its own trial.

    Raises:
        NotAccepted: the trial does not say PROMOTE, or the store serves another base.
        CheckpointError: a file was changed, or the store is damaged.
    """
    if trial.canary.decision != "PROMOTE":
        raise NotAccepted(
            f"candidate {trial.number}: the canary says {trial.canary.decision}: {trial.canary.reason}."
        )
    grounds = Grounds("online", f"candidate {trial.number}", seed, verdict, sha256_file(verdict))
    return store.promote(read_content(folder), grounds)


def roll_back(
    store: Store, versions: Sequence[str], reason: str
) -> tuple[Release | None, list[str]]:
    """Put the first of these versions that is whole into use; if none is, the bare base.

    Args:
        versions: the wanted one first; "": the bare base.
    Returns:
        What is in use now, and what was found damaged on the way. Doing it again changes nothing.
    """
    problems: list[str] = []
    for version in [*versions, ""]:
        try:
            if version == in_use(store):
                return store.current(), problems
            return store.rollback(version or BASE, reason=reason), problems
        except BemError as failed:
            problems.append(str(failed))
    raise NotAccepted("nothing to go back to:\n  " + "\n  ".join(problems))


def in_use(store: Store) -> str | None:
    """The version in use, "" for the bare base; None: what is in use is damaged."""
    try:
        release = store.current()
    except CheckpointError:
        return None
    return release.version if release else ""


def finite(weights: Weights) -> bool:
    """Is every number of a version one?"""
    return all(bool(t.isfinite().all()) for t in weights.values())
