"""A verdict in plain words: one sentence for people, one row per gate."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from bem.config import GatesConfig

if TYPE_CHECKING:
    from bem.stats.verdict import Check, Effect, Verdict

MINUS = "\u2212"
MOST_TROUBLES = 4
"""Checks that a sentence names."""


@dataclass(frozen=True)
class Gate:
    """One row of the gate table."""

    name: str
    value: str
    limit: str
    state: str
    """pass, fail or unknown."""
    why: str


# ------------------------------------------------------------------------------------- verdicts


def sentence(verdict: Verdict) -> str:
    """What was decided and why, for somebody who reads nothing else."""
    gain = _gain_of(verdict)
    if verdict.decision == "PROMOTE":
        return f"Better than {verdict.baseline}: {gain}. All {len(verdict.checks)} gates passed."
    if verdict.decision == "REJECT":
        return f"Rejected: {_troubles(verdict, False)}. Best metric: {gain}."
    more = f" About {verdict.n_more:,} more examples would decide." if verdict.n_more else ""
    return f"Not decided: {_troubles(verdict, None)}. Best metric: {gain}.{more}"


def headline(candidates: Mapping[str, Verdict], baseline: str) -> str:
    """What came out, in one line; nothing is claimed that no verdict says."""
    if not candidates:
        return f"Nothing was compared with {baseline}"
    better = [name for name, v in candidates.items() if v.decision == "PROMOTE"]
    dear = [name for name, v in candidates.items() if v.decision == "REJECT" and _gains(v)]
    if better:
        return f"{_and(better)} {_is(better)} better than {baseline}: {_gain_of(candidates[better[0]])}"
    if dear:
        price = _troubles(candidates[dear[0]], False)
        gain = _gain_of(candidates[dear[0]])
        return f"{_and(dear)} answered better than {baseline} ({gain}), but {_is(dear)} rejected: {price}"
    if all(v.decision == "REJECT" for v in candidates.values()):
        return f"Nothing here is better than {baseline}"
    return f"Nothing here is proven better than {baseline}"


def _gains(verdict: Verdict) -> bool:
    """The quality gate is passed; what failed is something else."""
    quality = [check.passed for check in verdict.checks if check.kind == "quality"]
    return bool(quality) and all(quality)


def _gain_of(verdict: Verdict) -> str:
    best = best_effect(verdict)
    return effect(best) if best else "no primary metric could be computed"


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _is(names: Sequence[str]) -> str:
    return "are" if len(names) > 1 else "is"


def reasons(verdict: Verdict) -> list[str]:
    """Everything that stood against promotion, with the numbers."""
    return [
        f"{word}: {check.name}: {check.reason}"
        for state, word in ((False, "Failed"), (None, "Unknown"))
        for check in verdict.checks
        if check.passed is state
    ]


def shots(count: int) -> str:
    """How the bare base was asked."""
    if not count:
        return "zero-shot"
    return f"{count} example{'s' * (count > 1)} of the skill shown"


def gates(verdict: Verdict) -> list[Gate]:
    """Every check as a row; the failed ones first."""
    order = {False: 0, None: 1, True: 2}
    state = {False: "fail", None: "unknown", True: "pass"}
    return [
        Gate(
            check.name,
            _value(check, verdict, check.value),
            _value(check, verdict, check.limit, is_limit=True),
            state[check.passed],
            check.reason,
        )
        for check in sorted(verdict.checks, key=lambda check: order[check.passed])
    ]


def gate_changes(gates: GatesConfig) -> str:
    """Settings that are not the defaults: `slice_margin_points 5 (default 1)`; "" if all are.

    A verdict can only be read beside them.
    """
    usual = GatesConfig()
    return "; ".join(
        f"{name} {_setting(getattr(gates, name))} (default {_setting(getattr(usual, name))})"
        for name in GatesConfig.model_fields
        if getattr(gates, name) != getattr(usual, name)
    )


def _setting(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def best_effect(verdict: Verdict) -> Effect | None:
    """The primary effect that speaks most for the candidate: most standard errors above 0."""
    primary = [e for e in verdict.effects if e.primary]
    return max(primary, key=lambda e: e.gain / (e.se or 1e-12), default=None)


def _troubles(verdict: Verdict, state: bool | None) -> str:
    parts = [_trouble(check, verdict) for check in verdict.checks if check.passed is state]
    if len(parts) > MOST_TROUBLES:
        parts[MOST_TROUBLES:] = [f"and {len(parts) - MOST_TROUBLES} more (see Gates)"]
    return ", ".join(parts) or "no check is open"


def _trouble(check: Check, verdict: Verdict) -> str:
    """What is wrong with one check, in a few words."""
    certain = check.passed is False
    if check.value is None:
        return f"{_plain_name(check)} could not be computed"
    value = _value(check, verdict, check.value)
    if check.kind == "quality":
        return "no useful gain" if certain else "the gain is not certain"
    if check.kind in ("regression", "slice"):
        place = f" on {check.slice}" if check.slice else ""
        fall = (
            f"{check.metric}{place} fell"
            if certain
            else f"a fall of {check.metric}{place} is not excluded"
        )
        return f"{fall} ({value})"
    if check.kind == "budget":
        return f"{value} {'FLOPs per token' if check.metric == 'flops' else check.metric}"
    if check.kind in ("latency", "memory"):
        what = f"{check.phase} latency" if check.phase else "added memory"
        return f"{what} {'is' if certain else 'may be above the limit:'} {value}"
    return f"{_plain_name(check)}: {value}"


def _value(check: Check, verdict: Verdict, value: float | None, is_limit: bool = False) -> str:
    """A check's number in the unit that people expect of it."""
    if value is None or not isfinite(value):
        return "–"
    if check.kind in ("quality", "regression", "slice"):
        judged = effect_of(check, verdict)
        return signed(judged, value) if judged else minus(f"{value:+.4g}")
    if check.kind == "budget":
        return minus(f"{'±' if is_limit else '+' if value >= 0 else '-'}{abs(value):.1%}")
    if check.kind in ("latency", "memory"):
        return f"×{value:.3f}"
    if check.kind == "kv_hit":
        return minus(f"{100 * value:+.2f}")
    return minus(f"{value:.4g}")


def effect_of(check: Check, verdict: Verdict) -> Effect | None:
    """The effect that a check of quality, regression or slice judges; None: there is none."""
    about = (check.metric, check.slice)
    return next((e for e in verdict.effects if (e.metric, e.slice) == about), None)


def _plain_name(check: Check) -> str:
    return check.name.replace("_", " ").replace(".", " ")


# -------------------------------------------------------------------------------------- numbers


def effect(e: Effect) -> str:
    """`em +1.2 points [+0.1, +2.3]`."""
    unit = " points" if e.points_per_unit else ""
    return f"{e.metric} {signed(e, e.gain)}{unit} {interval(e)}"


def interval(e: Effect) -> str:
    return f"[{signed(e, e.ci_low)}, {signed(e, e.ci_high)}]"


def signed(e: Effect, value: float) -> str:
    """A difference in points, or in the metric's own units if it has none."""
    if not isfinite(value):
        return "?"
    points = e.points_per_unit
    return minus(f"{value * points:+.1f}" if points else f"{value:+.3f}")


def minus(text: str) -> str:
    """A hyphen before a number becomes a minus sign."""
    return text.replace("-", MINUS)


@dataclass(frozen=True)
class Difference:
    """How far one arm is above another, in points, with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return minus(f"{self.value:+.1f} [{self.low:+.1f}, {self.high:+.1f}]")


def compared(name: str, other: str, gain: Difference, where: str = "") -> str:
    """`ar1 is better than s0: +1.8 points [+0.4, +3.1]`; never more than the interval shows."""
    verb = "shows no detectable difference from"
    if gain.low > 0:
        verb = "is better than"
    elif gain.high < 0:
        verb = "is worse than"
    value, interval = str(gain).split(" ", 1)
    return f"{name} {verb} {other}{where}: {value} points {interval}"


def times(ratio: float, lower: float, upper: float) -> str:
    """`×2.10 [2.02, 2.19]`: a ratio of times with its one-sided limits."""
    if upper == inf:
        return f"×{ratio:.2f} (too few rounds for limits)"
    return f"×{ratio:.2f} [{lower:.2f}, {upper:.2f}]"


# ----------------------------------------------------------------------------------------- text


def visible(text: str) -> str:
    """Text that cannot disturb the page it stands on: what has no glyph is named, `⟨U+001B⟩`.

    Line breaks and tabs stay. Named are control characters, halves of surrogate pairs (which UTF-8
    cannot write), line and paragraph separators, and marks that change the direction of writing.
    """
    return "".join(f"⟨U+{ord(c):04X}⟩" if _has_no_glyph(c) else c for c in text)


def _has_no_glyph(character: str) -> bool:
    if character in "\n\t":
        return False
    turns = unicodedata.bidirectional(character) in _DIRECTIONS
    return turns or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


_DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def shortened(text: str, most: int) -> str:
    """The beginning of a text, and how long it is if that is not all of it."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"
