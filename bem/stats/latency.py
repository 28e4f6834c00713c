"""How much slower: Hodges-Lehmann ratio of paired timings with limits by Wilcoxon inversion."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, inf, log, pi, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from bem.errors import DataError
from bem.stats.inputs import Floats, finite

EXACT_ROUNDS = 60
"""Up to this many rounds the null law of the signed-rank sum is computed, above it is normal."""
MAX_ROUNDS = 2000
MIN_ROUNDS = 5
"""Below it no one-sided 95 % limit exists."""
INTERIM_ALPHA = 0.001
"""Level at which a look before the last may end the timing."""


@dataclass(frozen=True)
class RatioLimits:
    """Typical ratio candidate / baseline with one-sided limits."""

    ratio: float
    lower: float
    """The true ratio lies below it with probability at most alpha. 0 if too few rounds."""
    upper: float
    """The true ratio lies above it with probability at most alpha. inf if too few rounds."""
    rounds: int
    alpha: float

    def within(self, most: float) -> bool | None:
        """Whether the true ratio is at most `most`; None: the limits do not tell yet."""
        return True if self.upper <= most else False if self.lower > most else None


def paired_ratio(candidate: ArrayLike, baseline: ArrayLike, alpha: float = 0.05) -> RatioLimits:
    """Ratio of paired positive measurements, robust to outliers (Hodges & Lehmann 1963).

        ratio = exp(median over i <= j of (d_i + d_j) / 2),  d = log candidate - log baseline

    The limits are the Walsh averages at which the one-sided signed-rank test would just reject.
    Rounds are pairs: interleave them (A B A B), so that drift of the machine cancels. Below 5
    rounds no limit exists at alpha = 0.05.

    Args:
        candidate, baseline: [rounds], same unit, > 0; rounds i of both were run side by side.
    Raises:
        DataError: different lengths, NaN, or a time that is not positive.
    """
    a, b = finite("candidate", candidate), finite("baseline", baseline)
    if a.size != b.size:
        raise DataError(
            f"{a.size} candidate rounds cannot be paired with {b.size} baseline rounds."
        )
    if a.size > MAX_ROUNDS:
        raise DataError(f"{a.size} rounds: at most {MAX_ROUNDS}; take the median of blocks first.")
    if min(a.min(), b.min()) <= 0:
        raise DataError(f"Timings must be positive, got {min(a.min(), b.min())}.")
    d = np.log(a) - np.log(b)
    walsh = _walsh(d)
    cut = _signed_rank_cut(d.size, alpha)
    lower = exp(walsh[cut]) if cut is not None else 0.0
    upper = exp(walsh[-1 - cut]) if cut is not None else inf
    return RatioLimits(exp(float(np.median(walsh))), lower, upper, d.size, alpha)


def further_rounds(
    candidate: ArrayLike, baseline: ArrayLike, most: float, budget: int,
    alpha: float = 0.05, power: float = 0.8,
) -> int:  # fmt: skip
    """Interleaved rounds still worth timing before the ratio is judged against `most`.

    0: the answer is there, or `budget` rounds were spent. Otherwise what `rounds_needed` expects
    from the estimate so far, at most as many again as there are, within the budget: an estimate from
    few rounds is not to be trusted further. Ask again after each batch.

    A look on the way only ends the timing where one-sided limits at `INTERIM_ALPHA` decide
    (Haybittle 1971, Peto 1976): so looking often leaves the level of the last look, that of the
    gate, as it is, up to `INTERIM_ALPHA` for each look.

    Args:
        candidate, baseline: [rounds] timings so far, interleaved; may be empty.
        most: limit of the ratio.
        budget: most rounds in all.
    """
    rounds = np.size(candidate)
    left = budget - rounds
    if left <= 0:
        return 0
    if rounds < MIN_ROUNDS:
        return min(left, MIN_ROUNDS - rounds)
    if paired_ratio(candidate, baseline, min(INTERIM_ALPHA, alpha)).within(most) is not None:
        return 0
    d = np.log(finite("candidate", candidate)) - np.log(finite("baseline", baseline))
    walsh = _walsh(d)
    spread = float(ndtri(0.75)) ** -1 * float(np.median(np.abs(d - np.median(d))))
    needed = rounds_needed(exp(float(np.median(walsh))), most, spread, alpha, power)
    ask = rounds if needed is None else min(max(needed - rounds, 1), rounds)
    return min(left, ask)


def rounds_needed(
    ratio: float, most: float, spread: float, alpha: float = 0.05, power: float = 0.8
) -> int | None:
    """Paired rounds until a one-sided signed-rank limit clears `most` with probability `power`.

    n = (z_{1-alpha} + z_power)^2 spread^2 (pi / 3) / log(most / ratio)^2, pi / 3 being what the
    signed-rank test needs more than the t-test on normal data (Lehmann 1975).

    Args:
        ratio: true ratio candidate / baseline.
        spread: standard deviation of the log ratio of one round.
    Returns:
        None if the ratio is the limit: no number of rounds would tell.
    """
    distance = abs(log(most / ratio))
    if distance == 0:
        return None
    z = float(ndtri(1 - alpha) + ndtri(power))
    return max(MIN_ROUNDS, ceil((z * spread / distance) ** 2 * pi / 3))


def _walsh(d: Floats) -> Floats:
    """Sorted means of all pairs i <= j."""
    i, j = np.triu_indices(d.size)
    return np.sort((d[i] + d[j]) / 2)


def _signed_rank_cut(n: int, alpha: float) -> int | None:
    """Largest c with P(W <= c) <= alpha for the signed-rank sum of n; None if there is none."""
    if n > EXACT_ROUNDS:
        mean, sd = n * (n + 1) / 4, sqrt(n * (n + 1) * (2 * n + 1) / 24)
        return int(mean + sd * float(ndtri(alpha)) - 0.5)
    ways = np.zeros(n * (n + 1) // 2 + 1)
    ways[0] = 1.0
    for rank in range(1, n + 1):  # each rank joins the sum or not, with probability 1/2
        ways[rank:] += ways[:-rank].copy()
        ways *= 0.5
    cut = int(np.searchsorted(np.cumsum(ways), alpha * (1 + 1e-12), "right")) - 1
    return cut if cut >= 0 else None
