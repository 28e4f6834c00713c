"""The quality gate: one primary metric must be better, beyond doubt and beyond its margin."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from bem.config import GatesConfig
from bem.stats.effects import Judged, margin_of
from bem.stats.power import more_examples
from bem.stats.scores import Metric
from bem.stats.verdict import Check, Effect

MAX_LEFT_SKEW = 1 / 30
"""A gain is believed while n >= 25 skewness^2 (Cochran 1977, sec. 2.15): acceleration >= -1/30.

Beyond it a few large losses, seen or not, decide the mean: with log-normal losses and n = 50 a
null variant would pass 6 times in 100.
"""


def quality_check(
    judged: Judged, gates: GatesConfig, family: Sequence[str], size: int, total: int
) -> Check:
    """Passed by one primary metric; failed when no primary metric can hold a useful gain.

    Args:
        size: hypotheses in the family, candidates x primary metrics.
        total: held-out examples.
    """
    primary = [e for e in judged.effects if e.primary]
    missing = [f"{m}: {judged.problems[m]}" for m in family if m in judged.problems]
    if not primary:
        reason = "cannot be computed: " + " ".join(missing or ["no primary metric."])
        return Check("quality", None, reason)
    gaps = {e.metric: _shortfalls(e, gates) for e in primary}
    winners = [e for e in primary if not gaps[e.metric]]
    best = min(winners or primary, key=lambda e: (e.gain <= 0, e.p_value))
    numbers = {
        "metric": best.metric, "value": best.gain,
        "limit": margin_of(_meaning(best), gates.quality_margin), "ci_low": best.ci_low,
        "ci_high": best.ci_high, "p_value": best.p_value, "adjusted_p": best.adjusted_p,
    }  # fmt: skip
    reason = "; ".join(
        e.text + (f" but {', '.join(gaps[e.metric])}" if gaps[e.metric] else " passes")
        for e in primary
    )
    reason += "".join(f"; {m}" for m in missing) + f". Family of {size}."
    if winners:
        return Check("quality", True, reason, **numbers)
    if not missing and all(_no_useful_gain(e, gates) for e in primary):
        useful = f"the smallest useful gain ({gates.useful_gain_points:g} points)"
        return Check("quality", False, f"{reason} Every upper limit is below {useful}.", **numbers)
    more = [m for e in primary if (m := _n_more(e, gates, size, total)) is not None]
    return Check("quality", None, reason, **numbers, n_more=min(more, default=None))


def too_few(e: Effect, gates: GatesConfig) -> str | None:
    """Why an effect rests on too few independent units, in words; None if it does not."""
    if e.effective_n >= gates.min_items:
        return None
    if e.n == e.examples:
        return f"only {e.n} independent examples of {gates.min_items}"
    unequal = f" of unequal size, which count as {e.effective_n:.1f} (Kish),"
    size = unequal if e.effective_n < e.n - 0.05 else ""
    return f"only {e.n} clusters{size} of {gates.min_items} that are needed"


def further(share: float, total: int) -> int:
    """Further held-out examples that are `share` times the `total` at hand; at least 1."""
    return max(1, ceil(share * total))


def _shortfalls(e: Effect, gates: GatesConfig) -> list[str]:
    """What keeps a primary metric from passing, in words; empty if nothing does."""
    margin = margin_of(_meaning(e), gates.quality_margin)
    gaps = _scarcity(e, gates)
    if "degenerate" in e.flags:
        gaps.append("all differences are equal")
    if e.acceleration < -MAX_LEFT_SKEW:
        gaps.append(f"a few large losses decide the mean (acceleration {e.acceleration:.3f})")
    if not e.ci_low > margin:
        gaps.append(f"lower limit is not above {margin:g}")
    if not e.rejected:
        gaps.append(f"adjusted p is above {gates.alpha:g}")
    if e.exact_p_greater is None:
        gaps.append("no exact test applies")
    elif e.exact_p_greater > gates.alpha / 2:
        gaps.append("the exact test shows no gain")
    return gaps


def _scarcity(e: Effect, gates: GatesConfig) -> list[str]:
    gaps = [gap] if (gap := too_few(e, gates)) else []
    if e.discordant < gates.min_discordant:
        gaps.append(f"only {e.discordant} examples differ of {gates.min_discordant}")
    return gaps


def _no_useful_gain(e: Effect, gates: GatesConfig) -> bool:
    """The interval excludes a gain worth having (without points: any gain over the margin)."""
    if _scarcity(e, gates):
        return False
    meaning = _meaning(e)
    margin = margin_of(meaning, gates.quality_margin)
    return e.ci_high < max(margin, margin_of(meaning, gates.useful_gain_points))


def _n_more(e: Effect, gates: GatesConfig, size: int, total: int) -> int | None:
    """Examples until the margin is cleared, or a useful gain excluded, whichever is nearer."""
    if e.effective_n < gates.min_items:
        return further(gates.min_items / e.effective_n - 1, total)
    if e.discordant < gates.min_discordant:
        return further(gates.min_discordant / max(e.discordant, 1) - 1, total)
    if e.acceleration < -MAX_LEFT_SKEW:  # it falls with sqrt(n)
        return further((e.acceleration / MAX_LEFT_SKEW) ** 2 - 1, total)
    meaning = _meaning(e)
    margin = margin_of(meaning, gates.quality_margin)
    useful = max(margin, margin_of(meaning, gates.useful_gain_points))
    roads = [
        more_examples(e.gain - margin, e.se, e.n, gates.alpha / size, gates.power),
        more_examples(useful - e.gain, e.se, e.n, gates.alpha, gates.power),
    ]
    return min((further(units / e.n, total) for units in roads if units is not None), default=None)


def _meaning(e: Effect) -> Metric:
    return Metric(True, e.points_per_unit)  # gains are turned already: higher is better
