"""What `judge` says: a decision, every check behind it, every effect with its interval."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, Literal

from bem.errors import DataError

Decision = Literal["PROMOTE", "REJECT", "INCONCLUSIVE"]
Kind = Literal[
    "baseline", "quality", "regression", "slice", "budget", "latency", "memory", "kv_hit",
    "router", "index_swap",
]  # fmt: skip
"""What a check is about. baseline: there is none; regression: a metric on the whole set."""


@dataclass(frozen=True)
class Check:
    """One gate. Only True counts as passed; None could not be decided, False is definitely
    failed. A limit that does not exist (too few rounds) is None."""

    kind: Kind
    passed: bool | None
    reason: str
    """One sentence with the numbers."""
    metric: str | None = None
    """What was measured: em, f1 ...; parameters or flops of the budget; plan of a router."""
    slice: str | None = None
    """None: the whole held-out set."""
    phase: str | None = None
    """prefill or decode; of the index swap a step (clean>=corrupt) or the trend."""
    value: float | None = None
    limit: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p_value: float | None = None
    adjusted_p: float | None = None
    n_more: int | None = None
    """Examples that would decide it, where more examples can."""

    def __post_init__(self) -> None:
        for name in ("value", "limit", "ci_low", "ci_high", "p_value", "adjusted_p"):
            number = getattr(self, name)
            if number is not None and not isfinite(number):
                object.__setattr__(self, name, None)

    @property
    def name(self) -> str:
        """`quality`, `slice.hard.em`, `latency.decode`: for people and look-ups; the fields say it
        typed."""
        if self.kind == "quality":  # one for all primary metrics; `metric` is the best of them
            return self.kind
        parts = (self.kind, self.slice, self.metric, self.phase)
        return ".".join(part for part in parts if part is not None)


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
    effective_n: float
    """Units of equal size that say as much: (sum m)^2 / sum m^2 over clusters of m examples (Kish
    1965); `n` where nothing is clustered."""
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

    def show(self, value: float) -> str:
        """A difference in points, or in the metric's own units if it has none."""
        points = self.points_per_unit
        return f"{value * points:+.2f}" if points else f"{value:+.4f}"

    @property
    def text(self) -> str:
        """Gain, interval, p-values, examples and minimal detectable effect, in one line."""
        p = f", p {self.p_value:.3g}"
        if self.adjusted_p is not None:
            p += f", adjusted {self.adjusted_p:.3g}"
        if self.exact_p is not None:
            p += f", exact {self.exact_p:.3g}"
        where = f"n {self.examples}"
        if self.n < self.examples:
            where += f" in {self.n} clusters (effectively {self.effective_n:.1f})"
        return (
            f"{self.metric} {self.show(self.gain)} [{self.show(self.ci_low)}, "
            f"{self.show(self.ci_high)}]{' points' if self.points_per_unit else ''}{p}, {where}, "
            f"MDE {self.show(self.mde)}"
        )


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
    """Gates that the configuration switched off."""
    not_judged: tuple[str, ...] = ()
    """Metrics and slices that were measured but stand under no gate, each with the reason."""

    @property
    def accepted(self) -> bool:
        return self.decision == "PROMOTE"

    @property
    def reasons(self) -> list[str]:
        """Every check in words: what failed first, then what is open, then what passed; last what
        was not judged."""
        order = {False: 0, None: 1, True: 2}
        word = {False: "FAILED", None: "OPEN", True: "passed"}
        ranked = sorted(self.checks, key=lambda c: order[c.passed])
        return [
            *(f"{word[c.passed]} {c.name}: {c.reason}" for c in ranked),
            *(f"not judged {what}" for what in self.not_judged),
        ]

    @property
    def mde(self) -> dict[str, float]:
        """Minimal detectable gain of each metric on the whole set, in its units."""
        return {e.metric: e.mde for e in self.effects if e.slice is None}

    def check(self, name: str) -> Check:
        """The check of this name.

        Raises:
            KeyError: there is none; names those there are.
        """
        named = {c.name: c for c in self.checks}
        if name not in named:
            raise KeyError(f"{self.candidate} has no check {name}; it has: {', '.join(named)}")
        return named[name]

    def effect(self, metric: str, slice: str | None = None) -> Effect:
        """The effect on this metric and slice.

        Raises:
            KeyError: it was not measured, or could not be computed.
        """
        for e in self.effects:
            if (e.metric, e.slice) == (metric, slice):
                return e
        raise KeyError(f"{self.candidate} has no effect on {metric}, slice {slice}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with `name`, `reasons` and `mde` for readers without this class."""
        checks = [{"name": c.name, **asdict(c)} for c in self.checks]
        return {**_plain(asdict(self)), "checks": checks, "reasons": self.reasons, "mde": self.mde}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_dict`: `Verdict.from_dict(v.to_dict()) == v`.

        Raises:
            DataError: a field is missing.
        """
        try:
            checks = tuple(_record(Check, c) for c in values["checks"])
            effects = tuple(
                _record(Effect, {**e, "flags": tuple(e["flags"])}) for e in values["effects"]
            )
            lists = {k: tuple(values[k]) for k in ("waived", "not_judged")}
            return _record(Verdict, {**values, "checks": checks, "effects": effects, **lists})
        except (KeyError, TypeError) as error:
            raise DataError(f"This is no verdict of this version: {error}. Judge again.") from None

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Verdict:
        """The inverse of `to_json`."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"This is no verdict: not JSON: {error}.") from None
        if not isinstance(values, dict):
            raise DataError(f"This is no verdict but {type(values).__name__}.")
        return Verdict.from_dict(values)

    def summary(self) -> str:
        """The decision and every reason, one per line."""
        more = "" if self.n_more is None else f" (about {self.n_more} more examples would decide)"
        head = f"{self.candidate} against {self.baseline}: {self.decision}{more}"
        return "\n".join([head, *(f"  {reason}" for reason in self.reasons)])


def _record(kind: type, values: Mapping[str, Any]) -> Any:
    return kind(**{f.name: values[f.name] for f in fields(kind)})


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
