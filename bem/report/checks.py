"""What a check of a verdict is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bem.stats.verdict import Check, Effect, Verdict


@dataclass(frozen=True)
class Subject:
    """What one check is about."""

    kind: str
    """quality, regression, slice, budget, latency, memory, kv_hit, router, ..."""
    metric: str | None = None
    """Or, of a budget, what is budgeted; of a router, which of its rules."""
    slice: str | None = None
    phase: str | None = None


def subject_of(check: Check, verdict: Verdict) -> Subject:
    """The one place that knows how a check says what it is about."""
    kind, _, rest = check.name.partition(".")
    if kind == "quality":  # about the primary metric whose gain it states
        primary = (e.metric for e in verdict.effects if e.primary and e.gain == check.value)
        return Subject(kind, metric=next(primary, None))
    if kind == "slice":
        part, _, metric = rest.rpartition(".")
        return Subject(kind, metric=metric, slice=part)
    if kind == "latency":
        return Subject(kind, phase=rest or None)
    return Subject(kind, metric=rest or None)


def effect_of(check: Check, verdict: Verdict) -> Effect | None:
    """The effect that a check of quality, regression or slice judges; None: there is none."""
    subject = subject_of(check, verdict)
    if subject.kind not in ("quality", "regression", "slice"):
        return None
    about = (subject.metric, subject.slice)
    return next((e for e in verdict.effects if (e.metric, e.slice) == about), None)
