"""What scores looked like when all was well, and the limits that follow from it.

A chart of falls needs a level, a noise and a limit. The noise is that of *block means*, because single
scores of one conversation or one hour resemble each other: a chart that takes them for independent
alarms a hundred times too often.

    S <- max(0, S + (mean - block mean) / s - k),   alarm when S > h          (Page 1954)
    k' = k less what the reference's own mean may be wrong by (1.5 standard errors) and its rhythm
    h  from  ARL = (e^(t b) - t b - 1) / (t k') blocks,  b = h + 1.166       (Siegmund 1985, t = 2 k')
    t  solves  k' = t/2 + c t^2/6 where c is the skewness of a block's fall: long tails of bad scores
       alarm more often than normal ones

A score's daily rhythm shows as a sine in the reference; its amplitude is added to k, so that its
trough is no drift. That works for rhythms no longer than the reference. Where the period is known the sine is
taken off every score instead, and k grows only by what the fitted sine may be wrong by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

BLOCK = 20
"""Scores in a block, to begin with."""
SLACK = 0.6
"""k' in standard deviations of a block mean: best for falls of 1.2 of these; for .5 sd of a score, 2.2 of these, near best."""
ALLOWANCE = 1.5
"""Standard errors by which the mean of the reference may lie too high."""
SEASONED = 6.0
"""Times the variance of the mean, where a season was fitted: level, cosine and sine add up to 3 at any phase, and at the
worst of all phases, which comes again every day, to about twice that."""
LEAST_BLOCKS = 10
OVERSHOOT = 1.166  # Siegmund's correction for a chart that is looked at in steps


@dataclass(frozen=True)
class Reference:
    """Level, noise and limits. Plain numbers: `Reference(**asdict(reference))` is the same one."""

    n: int
    mean: float
    sd: float
    """Of a score; never 0."""
    skewness: float
    inflation: float
    """Variance of a long mean by what it were if scores were independent; at least 1."""
    rhythm: float
    """Amplitude of the slow sines in the reference, in sd."""
    block: int
    block_sd: float
    """Of a block mean, in the scores' units."""
    slack: float
    """k: what a block may lie below the mean without adding to the chart, in block_sd."""
    limit: float
    """h, in block_sd."""
    period: float | None = None
    """Scores in a rhythm, where it is known."""
    season: tuple[float, float] = (0.0, 0.0)
    """Its cosine and sine, in the scores' units, over the number of the score."""

    def expected(self, numbers: np.ndarray) -> np.ndarray:
        """What the season adds to scores of these numbers, the first being 0."""
        if self.period is None:
            return np.zeros(len(numbers))
        return _circle(numbers, self.period) @ np.array(self.season)

    @property
    def most(self) -> float:
        """Largest deviation that one block may count for: one block alone never alarms."""
        return self.slack + 0.51 * self.limit

    @property
    def smallest_fall(self) -> float:
        """Fall that the chart finds within 300 scores on average, in sd."""
        return (self.slack + self.limit * self.block / 300) * self.block_sd / self.sd


def learn(
    scores: np.ndarray,
    arl: float,
    bounds: tuple[float, float] | None,
    period: float | None = None,
) -> Reference:
    """Level, noise and limits of a stationary stretch.

    Args:
        scores: (n,), n >= 10 blocks of 20.
        arl: scores between two false alarms, on average.
        bounds: of the scores, if known. A reference without any failure then still allows that one
            in n fails.
        period: of a known rhythm, in scores; n at most.
    """
    n, mean = len(scores), float(scores.mean())
    least = 1e-9 * max(1.0, abs(mean))
    if bounds is not None:
        least = (bounds[1] - bounds[0]) / math.sqrt(n)
    sd = max(float(scores.std(ddof=1)), least)
    z = (scores - mean) / sd
    season, fitted = (0.0, 0.0), 1.0
    if period is not None:
        (level, *season), z = _without_season(z, period)
        mean, season, fitted = mean + level * sd, (season[0] * sd, season[1] * sd), SEASONED
    short = _short_memory(z)
    rhythm, noise = _without_rhythm(z, short)
    block, inflation = _blocks(noise, short)
    block_sd = math.sqrt(inflation / block)  # in sd
    allowance = ALLOWANCE * math.sqrt(fitted * inflation / n)
    worst_slack = SLACK * block_sd
    skewness = float((z**3).mean())
    limit = chart_limit(worst_slack / block_sd, arl / block, -skewness / math.sqrt(block))
    slack = (worst_slack + allowance + rhythm) / block_sd
    swing = rhythm + math.hypot(*season) / sd
    return Reference(
        n, mean, sd, skewness, inflation, swing, block, block_sd * sd, slack, limit, period, season
    )


def chart_limit(slack: float, arl: float, skewness: float = 0.0) -> float:
    """The limit h of a one-sided CUSUM of independent steps with variance 1 and mean -slack.

    Args:
        slack: k > 0, in standard deviations of a step.
        arl: steps between two false alarms, on average; > 1.
        skewness: of a step, where long tails upwards are positive. Negative counts as 0.
    """
    rate = tail_rate(slack, skewness)

    def excess(b: float) -> float:
        return (math.exp(rate * b) - rate * b - 1) / (rate * slack) - arl

    highest = math.log(arl * rate * slack + 2) / rate + 5 / rate
    return max(float(brentq(excess, 1e-9, highest)) - OVERSHOOT, 0.0)  # pyright: ignore[reportArgumentType]


def tail_rate(slack: float, skewness: float = 0.0) -> float:
    """t > 0 such that P(S > h) falls as e^(-t h): the root of log E e^(t step) = 0, to third order."""
    if skewness <= 1e-9:
        return 2 * slack
    return (math.sqrt(0.25 + 2 * skewness * slack / 3) - 0.5) * 3 / skewness


def _short_memory(z: np.ndarray) -> float:
    """Variance inflation of an AR(1) with the lag-1 correlation of z; at least 1."""
    rho = min(max(float((z[1:] * z[:-1]).mean()), 0.0), 0.95)
    return (1 + rho) / (1 - rho)


def _circle(numbers: np.ndarray, period: float) -> np.ndarray:
    """(n, 2) cosine and sine."""
    angle = 2 * math.pi / period * numbers
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def _without_season(z: np.ndarray, period: float) -> tuple[list[float], np.ndarray]:
    """Level, cosine and sine of a known period by least squares, and z without them."""
    basis = np.concatenate([np.ones((len(z), 1)), _circle(np.arange(len(z)), period)], axis=1)
    found = np.linalg.lstsq(basis, z, rcond=None)[0]
    return found.tolist(), z - basis @ found


def _without_rhythm(z: np.ndarray, inflation: float) -> tuple[float, np.ndarray]:
    """Amplitude of the strongest slow sine beyond what noise shows, and z without that sine."""
    n = len(z)
    fastest = max(n // (10 * BLOCK), 1)  # cycles in the reference: a period is 10 blocks or more
    spectrum = np.fft.rfft(z, 4 * n)  # padded: periods between whole fractions of n
    rows = np.arange(2, 4 * fastest + 1)
    strongest = int(rows[np.abs(spectrum[rows]).argmax()])
    squared = 4 * abs(spectrum[strongest]) ** 2 / n**2
    # the largest of m exponential ordinates is about log m + 0.58; 1.5: seen in noise one time in four
    noise = 4 * (math.log(fastest) + 1.5) * inflation / n
    if squared <= noise:
        return 0.0, z
    squared -= noise**2 / squared  # a garrote: what stands out is hardly shrunk (Breiman 1995)
    angle = 2 * math.pi * strongest / (4 * n) * np.arange(n)
    basis = np.stack([np.cos(angle), np.sin(angle), np.ones(n)], 1)
    fitted = basis @ np.linalg.lstsq(basis, z, rcond=None)[0]
    return math.sqrt(squared), z - fitted


def _blocks(z: np.ndarray, short: float) -> tuple[int, float]:
    """Block size at which neighbours hardly correlate, and the inflation there.

    The larger of two estimates of the noise: an AR(1) is exact to 3 % but only short; blocks see
    everything, to 10 %. Too small a noise costs false alarms, too large a one some delay.
    """
    block = BLOCK
    while True:
        means = z[: len(z) // block * block].reshape(-1, block).mean(1)
        around = means - means.mean()
        variance = float(around @ around) / (len(means) - 1)
        neighbours = float(around[1:] @ around[:-1]) / max(float(around @ around), 1e-12)
        larger = block * 3 // 2
        if neighbours < 0.1 + 1.64 / math.sqrt(len(means)) or len(z) // larger < LEAST_BLOCKS:
            return block, max(variance * block, short, 1.0)
        block = larger
