"""Is a candidate good enough to serve? An answer that is valid whenever it is looked at.

    canary = Canary({"em": Margins()})
    for example in replayed:                    # first: both versions answer what is known
        canary.paired({"em": old(example)}, lambda: {"em": new(example)})
    canary.status().decision                    # PROMOTE, ROLLBACK or HOLD

    traffic = Canary({"score": Margins()}, share=0.1)      # then: a share of the traffic, drawn by coin
    traffic.answered(candidate=True, scores={"score": 0.8})

Every metric has two bets against a null hypothesis, by betting (Waudby-Smith & Ramdas 2024): each bet
is a martingale under its null, so that it exceeds 1/alpha at any look with chance alpha at most (Ville).

    not worse:  mean D <= -margin  refuted for *all* metrics    -> PROMOTE  (intersection-union: each at alpha)
    worse:      mean D >= -tolerance refuted for *any* of m     -> ROLLBACK (each at alpha / m)

D is candidate less baseline. tolerance >= margin, so that not both can be true. NaN, an exception or a
broken invariant of the candidate is ROLLBACK at once. No data is HOLD. The first decision stands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bem.errors import DataError
from bem.online.betting import Bet
from bem.stats.verdict import Check, Decision, Verdict

CanaryDecision = Literal["PROMOTE", "ROLLBACK", "HOLD"]
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Margins:
    """What one metric may lose. In the metric's units; higher is better."""

    margin: float = 0.02
    """Promoted only when a loss of so much is ruled out."""
    tolerance: float = 0.02
    """Rolled back when a loss of more than this is shown."""
    low: float = 0.0
    high: float = 1.0
    """Lowest and highest possible score."""

    def __post_init__(self) -> None:
        width = self.high - self.low
        if not (-math.inf < self.low < self.high < math.inf):
            raise ValueError(
                f"a metric's range must be finite and in order; got {self.low}, {self.high}."
            )
        if not -width < self.margin <= self.tolerance < width:
            raise ValueError(
                f"need margin <= tolerance, both less than the range {width:g}; got {self.margin}, "
                f"{self.tolerance}: with a larger margin one candidate could be promoted and rolled back."
            )


@dataclass(frozen=True)
class MetricState:
    """One metric at a look."""

    metric: str
    n: int
    difference: float | None
    """Estimated mean of candidate less baseline; None: no data."""
    e_not_worse: float
    """Evidence against `mean D <= -margin`, largest so far."""
    e_worse: float
    """Evidence against `mean D >= -tolerance`, largest so far."""


@dataclass(frozen=True)
class CanaryStatus:
    """What a look shows."""

    decision: CanaryDecision
    reason: str
    metrics: tuple[MetricState, ...]


class Canary:
    """One candidate against one baseline. Use one for replay and another for traffic."""

    def __init__(
        self,
        metrics: Mapping[str, Margins],
        alpha: float = 0.05,
        share: float | None = None,
        n_max: int | None = None,
    ):
        """
        Args:
            metrics: what must not get worse.
            alpha: chance of a false promotion, and of a false rollback, over all looks together.
            share: None: paired, both versions answer the same. Else the chance with which a request was given
                to the candidate, drawn for each by itself and not by who asks.
            n_max: events after which an undecided candidate is rolled back; None: it is held for ever.
        Raises:
            ValueError: an argument out of its range.
        """
        if not metrics:
            raise ValueError("a canary needs a metric: without one nothing can be judged.")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie in (0, 1), got {alpha}.")
        if share is not None and not 0 < share < 1:
            raise ValueError(f"share must lie strictly between 0 and 1, got {share}.")
        if n_max is not None and n_max < 1:
            raise ValueError(f"n_max must be at least 1, got {n_max}.")
        self.metrics, self.alpha, self.share, self.n_max = dict(metrics), alpha, share, n_max
        self.n = 0
        self.decision: CanaryDecision = "HOLD"
        self.reason = "no data yet"
        self._bets = {
            name: (
                Bet(-m.margin, m.high - m.low, share, fallen=False),
                Bet(-m.tolerance, m.high - m.low, share, fallen=True),
            )
            for name, m in self.metrics.items()
        }

    # --- evidence -------------------------------------------------------------------------------

    def paired(
        self,
        baseline: Scores,
        candidate: Scores | Callable[[], Scores],
        only: Sequence[str] | None = None,
    ) -> CanaryStatus:
        """One example that both versions answered.

        Args:
            baseline: metric -> score.
            candidate: likewise, or what computes it: an exception in it is a rollback.
            only: the metrics that this example is an example of; None: all.
        Raises:
            ValueError: this canary watches a share of traffic; or baseline scores that are missing, not finite or
                out of range: then nothing was counted.
        """
        if self.share is not None:
            raise ValueError("this canary watches a share of traffic: use `answered`.")
        asked = tuple(self.metrics) if only is None else tuple(only)
        old = self._checked(baseline, "baseline", asked)
        new = self._candidate(candidate, asked)
        if new is None or self.decision != "HOLD":
            return self.status()
        for name in asked:
            for bet in self._bets[name]:
                bet.paired(new[name] - old[name])
        return self._look()

    def answered(self, candidate: bool, scores: Scores | Callable[[], Scores]) -> CanaryStatus:
        """One answered request, of the candidate or of the baseline.

        Raises:
            ValueError: this canary is paired; or baseline scores that are missing, not finite or out of range.
        """
        if self.share is None:
            raise ValueError("this canary is paired: use `paired`, or give it a share of traffic.")
        if candidate:
            found = self._candidate(scores, tuple(self.metrics))
        else:
            given = scores() if callable(scores) else scores
            found = self._checked(given, "baseline", tuple(self.metrics))
        if found is None or self.decision != "HOLD":
            return self.status()
        for name, bets in self._bets.items():
            low = self.metrics[name].low
            for bet in bets:
                bet.answered(candidate, found[name] - low)
        return self._look()

    def broken(self, what: str) -> CanaryStatus:
        """An invariant does not hold: roll back at once."""
        return self._decide("ROLLBACK", what)

    def _candidate(
        self, scores: Scores | Callable[[], Scores], asked: Sequence[str]
    ) -> dict[str, float] | None:
        """None: it was rolled back, for its scores cannot be had."""
        try:
            return self._checked(scores() if callable(scores) else scores, "candidate", asked)
        except Exception as failed:  # whatever it was: a candidate that raises must not serve
            self._decide("ROLLBACK", f"the candidate failed: {type(failed).__name__}: {failed}")
            return None

    def _checked(self, scores: Scores, whose: str, asked: Sequence[str]) -> dict[str, float]:
        found = {}
        for name in asked:
            m, value = self.metrics[name], scores.get(name)
            if value is None or not m.low <= value <= m.high:  # also true for NaN
                raise ValueError(
                    f"{whose}: {name} is {value}, and must be a number in [{m.low:g}, {m.high:g}]."
                )
            found[name] = float(value)
        return found

    # --- deciding -------------------------------------------------------------------------------

    def _look(self) -> CanaryStatus:
        self.n += 1
        worse = max(self._bets, key=lambda name: self._bets[name][1].best)
        least = min(self._bets, key=lambda name: self._bets[name][0].best)
        bar, bar_worse = 1 / self.alpha, len(self._bets) / self.alpha
        if self._bets[worse][1].best >= bar_worse:
            return self._decide("ROLLBACK", self._words(worse, 1, f"e-value over {bar_worse:g}"))
        if self._bets[least][0].best >= bar:
            return self._decide("PROMOTE", self._words(least, 0, f"e-value over {bar:g}"))
        if self.n_max is not None and self.n >= self.n_max:
            return self._decide("ROLLBACK", f"undecided after {self.n} events")
        self.reason = self._words(least, 0, f"e-value not yet {bar:g}")
        return self.status()

    def _words(self, name: str, which: int, state: str) -> str:
        bet, m = self._bets[name][which], self.metrics[name]
        claim = f"a loss above {m.tolerance:g}" if which else f"no loss of {m.margin:g}"
        return (
            f"{name}: {claim}: {state} ({bet.best:.3g}) after {bet.n} events, mean {bet.mean:+.3g}"
        )

    def _decide(self, decision: CanaryDecision, reason: str) -> CanaryStatus:
        if self.decision == "HOLD":
            self.decision, self.reason = decision, reason
        return self.status()

    def shown(self, metric: str) -> bool:
        """Is a loss of its margin ruled out?"""
        return self._bets[metric][0].best >= 1 / self.alpha

    def bets_on(self, metric: str) -> int:
        """Examples of it so far."""
        return self._bets[metric][0].n

    def words(self, metric: str) -> str:
        """What speaks against a loss of its margin."""
        return self._words(metric, 0, "e-value")

    def status(self) -> CanaryStatus:
        """A look costs nothing: as many as you like."""
        states = tuple(
            MetricState(name, up.n, up.mean if up.n else None, up.best, down.best)
            for name, (up, down) in self._bets.items()
        )
        return CanaryStatus(self.decision, self.reason, states)

    def verdict(self, candidate: str, baseline: str) -> Verdict:
        """The same decision as the one record that promotes: ROLLBACK is REJECT, HOLD is INCONCLUSIVE."""
        words: dict[CanaryDecision, Decision]
        words = {"PROMOTE": "PROMOTE", "ROLLBACK": "REJECT", "HOLD": "INCONCLUSIVE"}
        checks = [
            Check(
                "regression",
                self._passed(name),
                self._words(name, int(self._passed(name) is False), "e-value"),
                metric=name,
                value=up.mean if up.n else None,
                limit=-self.metrics[name].margin,
                p_value=min(1.0, 1 / up.best),
            )
            for name, (up, _) in self._bets.items()
        ]
        passed = {"PROMOTE": True, "ROLLBACK": False, "HOLD": None}[self.decision]
        checks.append(Check("quality", passed, self.reason))
        decision = words[self.decision]
        return Verdict(
            candidate, baseline, decision, tuple(checks), (), None, self.alpha, len(self.metrics)
        )

    def _passed(self, name: str) -> bool | None:
        up, down = self._bets[name]
        if down.best >= len(self._bets) / self.alpha:
            return False
        return True if up.best >= 1 / self.alpha else None

    # --- surviving a restart --------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything, wealth included, as JSON values: a restart gives no second chance."""
        return {
            "metrics": {name: asdict(m) for name, m in self.metrics.items()},
            "alpha": self.alpha,
            "share": self.share,
            "n_max": self.n_max,
            "n": self.n,
            "decision": self.decision,
            "reason": self.reason,
            "bets": {name: [bet.state() for bet in bets] for name, bets in self._bets.items()},
        }

    def to_json(self) -> str:
        """`state` as text."""
        return json.dumps(self.state(), allow_nan=False)

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Canary:
        """The inverse of `state`.

        Raises:
            DataError: not a canary's state.
        """
        try:
            metrics = {name: Margins(**m) for name, m in state["metrics"].items()}
            canary = Canary(metrics, state["alpha"], state["share"], state["n_max"])
            canary.n, canary.reason = state["n"], state["reason"]
            canary.decision = state["decision"]
            for name, bets in canary._bets.items():
                for bet, kept in zip(bets, state["bets"][name], strict=True):
                    bet.restore(kept)
        except (KeyError, TypeError, ValueError, AttributeError) as failed:
            raise DataError(f"this is no state of a canary: {failed!r}.") from None
        return canary

    @staticmethod
    def from_json(text: str) -> Canary:
        """The inverse of `to_json`."""
        try:
            return Canary.from_state(json.loads(text))
        except ValueError as failed:
            raise DataError(f"this is no state of a canary: {failed}.") from None
