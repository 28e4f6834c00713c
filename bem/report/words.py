"""A verdict in plain words: one sentence for people, one row per gate."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

MINUS = "\u2212"


@dataclass(frozen=True)
class Gate:
    """One row of the gate table."""

    name: str
    value: str
    limit: str
    state: str
    """pass, fail or unknown."""
    why: str


def sentence(verdict: dict[str, Any]) -> str:
    """What was decided and why, for somebody who reads nothing else."""
    failed = [c for c in verdict["checks"] if c["passed"] is False]
    unknown = [c for c in verdict["checks"] if c["passed"] is None]
    best = best_effect(verdict)
    gain = f"{effect(best)}" if best else "no primary metric could be computed"
    if verdict["decision"] == "PROMOTE":
        return (
            f"Better than {verdict['baseline']}: {gain}. All {len(verdict['checks'])} gates passed."
        )
    if verdict["decision"] == "REJECT":
        return f"Rejected: {_list([_trouble(c, verdict) for c in failed])}. Best metric: {gain}."
    more = verdict["n_more"]
    wanted = f" About {more:,} more examples would decide." if more else ""
    return f"Not decided: {_list([_trouble(c, verdict) for c in unknown])}. Best metric: {gain}.{wanted}"


def reasons(verdict: dict[str, Any]) -> list[str]:
    """Everything that stood against promotion, with the numbers."""
    return [
        f"{'Failed' if c['passed'] is False else 'Unknown'}: {c['name']}: {c['reason']}"
        for state in (False, None)
        for c in verdict["checks"]
        if c["passed"] is state
    ]


def gates(verdict: dict[str, Any]) -> list[Gate]:
    """Every check as a row; the failed ones first."""
    order = {False: 0, None: 1, True: 2}
    state = {False: "fail", None: "unknown", True: "pass"}
    return [
        Gate(
            check["name"],
            _value(check, verdict, check["value"]),
            _value(check, verdict, check["limit"], limit=True),
            state[check["passed"]],
            check["reason"],
        )
        for check in sorted(verdict["checks"], key=lambda c: order[c["passed"]])
    ]


def best_effect(verdict: dict[str, Any]) -> dict[str, Any] | None:
    """The primary effect that speaks most for the candidate: most standard errors above 0."""
    primary = [e for e in verdict["effects"] if e["primary"]]
    return max(primary, key=lambda e: e["gain"] / (e["se"] or 1e-12), default=None)


def effect(e: dict[str, Any]) -> str:
    """`em +1.2 points [+0.1, +2.3]`."""
    unit = " points" if e["points_per_unit"] else ""
    return f"{e['metric']} {signed(e, e['gain'])}{unit} {interval(e)}"


def interval(e: dict[str, Any]) -> str:
    return f"[{signed(e, e['ci_low'])}, {signed(e, e['ci_high'])}]"


def signed(e: dict[str, Any], value: float | None) -> str:
    """A difference in points, or in the metric's own units if it has none."""
    if value is None:
        return "?"
    points = e["points_per_unit"]
    return minus(f"{value * points:+.1f}" if points else f"{value:+.3f}")


def minus(text: str) -> str:
    """A hyphen before a number becomes a minus sign."""
    return text.replace("-", MINUS)


def _trouble(check: dict[str, Any], verdict: dict[str, Any]) -> str:
    """What is wrong with one check, in a few words."""
    kind, _, rest = check["name"].partition(".")
    certain = check["passed"] is False
    if check["value"] is None:
        return f"{_plain_name(check['name'])} could not be computed"
    value = _value(check, verdict, check["value"])
    if kind == "quality":
        return "no useful gain" if certain else "the gain is not certain"
    if kind in ("regression", "slice"):
        place = " on ".join(reversed(rest.rsplit(".", 1))) if kind == "slice" else rest
        return f"{place} fell ({value})" if certain else f"{place} may have fallen ({value})"
    if kind == "budget":
        return f"{value} {rest}" if rest == "parameters" else f"{value} FLOPs per token"
    if kind in ("latency", "memory"):
        what = f"{rest} latency" if rest else "peak memory"
        over = "is" if certain else "may be above the limit:"
        return f"{what} {over} {value}"
    return f"{_plain_name(check['name'])}: {value}"


def _value(
    check: dict[str, Any], verdict: dict[str, Any], value: float | None, limit: bool = False
) -> str:
    """A check's number in the unit that people expect of it."""
    if value is None:
        return "–"
    kind = check["name"].partition(".")[0]
    if kind in ("quality", "regression", "slice"):
        e = _effect_of(check, verdict)
        return signed(e, value) if e else minus(f"{value:+.4g}")
    if kind == "budget":
        return minus(f"{'±' if limit else '+' if value >= 0 else '-'}{abs(value):.1%}")
    if kind in ("latency", "memory"):
        return f"×{value:.3f}"
    if kind == "kv_hit":
        return minus(f"{100 * value:+.2f}")
    return minus(f"{value:.4g}")


def _effect_of(check: dict[str, Any], verdict: dict[str, Any]) -> dict[str, Any] | None:
    """The effect that a check is about: its metric says in which unit to show the number."""
    kind, _, rest = check["name"].partition(".")
    metric = rest.rsplit(".", 1)[-1]
    fits = [e for e in verdict["effects"] if kind == "quality" or e["metric"] == metric]
    return next((e for e in fits if e["gain"] == check["value"]), None)


def _plain_name(name: str) -> str:
    return name.replace("_", " ").replace(".", " ")


def _list(parts: list[str], most: int = 4) -> str:
    if len(parts) > most:
        parts = [*parts[:most], f"and {len(parts) - most} more (see Gates)"]
    return ", ".join(parts) or "no check is open"


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
    verb = "is not told apart from"
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
