"""What `judge` says: a decision, every check behind it, every effect with its interval."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal

Decision = Literal["PROMOTE", "REJECT", "INCONCLUSIVE"]


@dataclass(frozen=True)
class Check:
    """One gate. Only True counts as passed; None could not be decided, False is definitely
    failed."""

    name: str
    passed: bool | None
    reason: str
    """One sentence with the numbers."""
    value: float | None = None
    limit: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p_value: float | None = None
    adjusted_p: float | None = None
    n_more: int | None = None
    """Examples that would decide it, where more examples can."""


@dataclass(frozen=True)
class Effect:
    """How much better (positive) or worse (negative) the candidate is, in one metric on one
    slice."""

    metric: str
    slice: str | None
    """None: the whole held-out set."""
    primary: bool
    """In the declared family: tested, with false discovery control."""
    baseline: float
    candidate: float
    gain: float
    """Candidate minus baseline, turned so that positive is better; in the units of the metric."""
    ci_low: float
    ci_high: float
    points_per_unit: float | None
    p_value: float
    """Two-sided BCa p against the quality margin."""
    n: int
    """Independent units: examples, or clusters."""
    examples: int
    se: float
    mde: float
    """Smallest true gain that these data would show with the configured power."""
    acceleration: float
    """Skewness of the gain's law over 6; below 0: few large losses against many small gains."""
    engine: str
    flags: tuple[str, ...]
    discordant: int
    """Units that differ."""
    exact_p: float | None = None
    """Two-sided sign-flip (exact McNemar) p; only of primary effects."""
    exact_p_greater: float | None = None
    adjusted_p: float | None = None
    rejected: bool = False
    """The null hypothesis is, by Benjamini-Hochberg over the family."""
    fcr_low: float | None = None
    fcr_high: float | None = None
    """Interval adjusted for selection; only of rejected ones."""


@dataclass(frozen=True)
class Verdict:
    """The one thing that can promote."""

    candidate: str
    baseline: str | None
    decision: Decision
    checks: tuple[Check, ...]
    effects: tuple[Effect, ...]
    n_more: int | None
    """Further examples that would decide what more examples can decide; None if they cannot."""
    alpha: float
    family_size: int
    """Hypotheses corrected for together: candidates x primary metrics."""
    waived: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return self.decision == "PROMOTE"

    @property
    def reasons(self) -> list[str]:
        """Every check in words: what failed first, then what is open, then what passed."""
        order = {False: 0, None: 1, True: 2}
        word = {False: "FAILED", None: "OPEN", True: "passed"}
        ranked = sorted(self.checks, key=lambda c: order[c.passed])
        return [f"{word[c.passed]} {c.name}: {c.reason}" for c in ranked]

    @property
    def mde(self) -> dict[str, float]:
        """Minimal detectable gain of each metric on the whole set, in its units."""
        return {e.metric: e.mde for e in self.effects if e.slice is None}

    def check(self, name: str) -> Check:
        """The check of this name."""
        return next(c for c in self.checks if c.name == name)

    def effect(self, metric: str, slice: str | None = None) -> Effect:
        """The effect on this metric and slice."""
        return next(e for e in self.effects if (e.metric, e.slice) == (metric, slice))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become None."""
        plain = _finite(asdict(self))
        return {**plain, "reasons": self.reasons, "mde": _finite(self.mde)}

    def summary(self) -> str:
        """The decision and every reason, one per line."""
        more = "" if self.n_more is None else f" (about {self.n_more} more examples would decide)"
        head = f"{self.candidate} against {self.baseline}: {self.decision}{more}"
        return "\n".join([head, *(f"  {reason}" for reason in self.reasons)])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value
