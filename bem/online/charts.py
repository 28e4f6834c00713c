"""The second opinions beside the chart that decides: an e-detector, and a vote of three tests.

Both read whole blocks, many at once: what depends on a block alone is computed for all of them
together, what depends on the past in a short loop. One block at a time gives the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr

from bem.online.reference import Reference, tail_rate

RECENT = 10
"""Blocks in the recent window of Welch's and the Kolmogorov-Smirnov test."""
QUORUM = 2


class EDetector:
    """Any bounded distribution: a bet that the mean has fallen (Shin, Ramdas & Rinaldo,
    arXiv:2203.03532).

        R <- (1 + l (m0 - x)) (R + 1)   for l on a grid,   alarm when their mean >= ARL

    Scores between false alarms are ARL at least, whatever the distribution, as long as
    E[x | past] >= m0 = mean - max(2 standard errors, 0.1 sd). Looked at when a block ends.
    """

    def __init__(self, reference: Reference, bounds: tuple[float, float], arl: float):
        low, high = bounds
        error = 2 * reference.sd * math.sqrt(reference.inflation / reference.n)
        fallen = reference.mean - max(error, 0.1 * reference.sd)
        self.low, self.width, self.arl = low, high - low, arl
        self.m0 = max((fallen - low) / self.width, 1e-6)
        self.bets = 0.95 / max(1 - self.m0, 1e-3) * 2.0 ** -np.arange(6)
        self.evidence = np.zeros(len(self.bets))

    def restart(self) -> None:
        self.evidence = np.zeros(len(self.bets))

    def read(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, block) scores -> (n, bets) factor of what was there, and what began inside the block."""
        gap = self.m0 - (blocks - self.low) / self.width
        factors = 1 + gap[:, ::-1, None] * self.bets
        products = np.cumprod(factors, axis=1)
        return products[:, -1], products.sum(axis=1)

    def step(self, factor: np.ndarray, begun: np.ndarray) -> bool:
        """Whether one more block makes it an alarm."""
        self.evidence = np.minimum(factor * self.evidence + begun, 1e100)
        return bool(self.evidence.mean() >= self.arl)


@dataclass(frozen=True)
class Looks:
    """What the three tests see when each block ends."""

    welch: np.ndarray
    """(n,) one-sided p-values; NaN: not enough data, or no spread."""
    smirnov: np.ndarray
    total: np.ndarray
    """(n,) sum of a block's steps of the Page-Hinkley chart."""
    peak: np.ndarray
    """(n,) highest sum of the last steps of a block, at least 0."""


class Vote:
    """Welch's test, Kolmogorov-Smirnov's and Page-Hinkley's chart, one-sided, on single scores.

    A test without enough data has no vote; two must vote and more than half of them must say drift. Each
    works at the same level a look, so that two of three are false once in an ARL at most (the sum
    of their levels by two, whatever their dependence). Correlated scores count for as many as the
    reference's inflation says.
    """

    def __init__(self, reference: Reference, scores: np.ndarray, arl: float):
        """scores: (n,) of the reference."""
        self.reference, self.sorted = reference, np.sort(scores)
        self.variance = float(scores.var(ddof=1))
        self.level = min(reference.block * QUORUM / (3 * arl), 0.05)
        allowance = 2 * math.sqrt(reference.inflation / reference.n)
        self.slack = 0.25 + allowance + reference.rhythm
        self.limit = math.log(1 / self.level) / (tail_rate(0.25) / reference.inflation)
        self.restart()

    def restart(self) -> None:
        self.page = 0.0
        self.recent = np.empty(0)

    def read(self, blocks: np.ndarray) -> Looks:
        """(n, block) scores, in order; keeps the newest for the next call."""
        ref, size = self.reference, self.reference.block
        steps = ((ref.mean - blocks) / ref.sd - self.slack)[:, ::-1]
        sums = np.cumsum(steps, axis=1)
        line = np.concatenate([self.recent, blocks.reshape(-1)])
        self.recent = line[-(RECENT - 1) * size :]
        welch, smirnov = np.full((2, len(blocks)), np.nan)
        full = len(line) // size - RECENT + 1
        if full > 0:
            windows = np.lib.stride_tricks.sliding_window_view(line, RECENT * size)[::size]
            welch[-full:], smirnov[-full:] = self._welch(windows), self._smirnov(windows)
        return Looks(welch, smirnov, sums[:, -1], np.maximum(sums.max(axis=1), 0.0))

    def _welch(self, windows: np.ndarray) -> np.ndarray:
        ref, m = self.reference, windows.shape[1]
        mean = windows.mean(axis=1)
        spread = np.square(windows - mean[:, None]).mean(axis=1) * m / (m - 1)
        n, m = ref.n / ref.inflation, m / ref.inflation
        a, b = self.variance / n, spread / m
        with np.errstate(invalid="ignore", divide="ignore"):
            t = (ref.mean - ref.rhythm * ref.sd - mean) / np.sqrt(a + b)
            freedom = (a + b) ** 2 / (a**2 / max(n - 1, 1) + b**2 / max(m - 1, 1))
            return stdtr(freedom, -t)

    def _smirnov(self, windows: np.ndarray) -> np.ndarray:
        """p <= exp(-2 D^2 n m / (n + m)), D the most by which recent scores lie below."""
        n, m = self.reference.n, windows.shape[1]
        below = np.searchsorted(self.sorted, np.sort(windows, axis=1), side="right") / n
        most = np.maximum((np.arange(1, m + 1) / m - below).max(axis=1), 0.0)
        # a sine of amplitude a moves a normal distribution function by 0.4 a at most
        most = np.maximum(most - 0.4 * self.reference.rhythm, 0.0)
        return np.exp(-2 * most**2 * (n * m / (n + m)) / self.reference.inflation)

    def step(self, looks: Looks, i: int) -> bool | None:
        """The vote when block i ends; None: fewer than two tests have enough data."""
        self.page = max(self.page + float(looks.total[i]), float(looks.peak[i]))
        tests = [float(looks.welch[i]), float(looks.smirnov[i])]
        votes = [p < self.level for p in tests if not math.isnan(p)]
        votes.append(self.page > self.limit)
        return None if len(votes) < QUORUM else 2 * sum(votes) > len(votes)
