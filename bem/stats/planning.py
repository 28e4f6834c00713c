"""Before a run: how many rows, seeds and timing rounds a wanted decision needs.

Normal approximations of what `judge` does; benchmarks/power.py shows how close they come.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
from scipy.special import ndtr, ndtri

from bem.config import GatesConfig
from bem.errors import ConfigError, DataError
from bem.stats.comparisons import compare, meaning_of
from bem.stats.guards import OUTLYING_LEVEL, SPREAD_LEVEL
from bem.stats.inputs import cluster_codes
from bem.stats.measurement import Measurement
from bem.stats.paired import variance_components
from bem.stats.pairing import with_shared_groups

MOST_ROWS = 10_000_000


@dataclass(frozen=True)
class Spread:
    """How much an example's gain varies, in squared points."""

    examples: float
    """Between examples, what stays when seeds are averaged."""
    seeds: float
    """Between seeds within an example; falls with their number."""
    design_effect: float = 1.0
    """Squared error of the mean by that of independent examples (Kish 1965)."""

    def per_row(self, seeds: int) -> float:
        """Squared error of the mean of n rows, times n."""
        return self.design_effect * (self.examples + self.seeds / seeds)


@dataclass(frozen=True)
class Goal:
    """What is to be decided."""

    gain_points: float
    """True gain of the candidate."""
    slices: int = 0
    """Guarded slices of equal size, all alike."""
    hypotheses: int = 1
    """Candidates x primary metrics."""

    def __post_init__(self) -> None:
        if not -100 < self.gain_points < 100:  # also true for NaN
            raise ConfigError(
                f"a gain must lie between -100 and 100 points, got {self.gain_points:g}."
            )


def assumed_spread(
    score: float, shared: float, gain_points: float, seeds_alike: float = 0.5,
    cluster_size: float = 1.0, cluster_correlation: float = 0.0,
) -> Spread:  # fmt: skip
    """Spread of right-or-wrong answers before anything was measured.

    An example is answered right with probability p ~ beta(2 score, 2 - 2 score), so that two answers
    to it differ with probability 2 E[p (1 - p)] = 4/3 score (1 - score); a share of the candidate's
    answers is the baseline's.

    Args:
        score: of the baseline, in (0, 1).
        shared: share of answers that both arms give alike, in [0, 1).
        gain_points: at least so many answers must differ.
        seeds_alike: correlation of an example's gain between seeds.
        cluster_size: mean examples per source document; their gains correlate by
            `cluster_correlation`.
    Raises:
        ConfigError: a number outside its range.
    """
    for name, value, low, high in (
        ("score", score, 0, 1), ("shared", shared, -1e-9, 1), ("seeds_alike", seeds_alike, -1e-9, 1 + 1e-9),
        ("cluster_correlation", cluster_correlation, -1e-9, 1 + 1e-9),
        ("cluster_size", cluster_size, 1 - 1e-9, 1e9), ("gain_points", gain_points, -100, 100),
    ):  # fmt: skip
        if not low < value < high:
            raise ConfigError(f"{name} must lie between {low:.0f} and {high:.0f}, got {value:g}.")
    differ = (1 - shared) * 4 / 3 * score * (1 - score)
    gain = abs(gain_points) / 100
    variance = 1e4 * (max(differ, gain) - gain**2)
    design = 1 + (cluster_size - 1) * cluster_correlation
    return Spread(seeds_alike * variance, (1 - seeds_alike) * variance, design)


def measured_spread(baseline: Measurement, candidate: Measurement, metric: str) -> Spread:
    """Spread of a measured pair, with its clusters.

    Raises:
        DataError: other examples, a metric that one side lacks or that has no points, NaN.
    """
    meaning = meaning_of(baseline, metric)
    if meaning.points_per_unit is None or meaning.kind == "corpus":
        raise DataError(f"{metric} has no score per example in points: a plan needs one that has.")
    baseline = with_shared_groups(baseline, {candidate.name: candidate})
    place = candidate.aligned_to(baseline.example_ids)
    whole, codes = np.ones(baseline.n, dtype=bool), cluster_codes(baseline.clusters, baseline.n)
    clustered = compare("plan", baseline, candidate, metric, None, whole, codes, place)
    single = compare("plan", baseline, candidate, metric, None, whole, None, place)
    squares = [float(c.deviations @ c.deviations) for c in (clustered, single)]
    design = squares[0] / squares[1] if squares[1] > 0 else 1.0
    new = np.asarray(candidate.metrics[metric])[:, place]
    old = np.asarray(baseline.metrics[metric])
    if new.shape == old.shape:
        between, within = variance_components(new - old)
    else:
        between, within = squares[1] * baseline.n, 0.0
    scale = meaning.points_per_unit**2
    return Spread(scale * between, scale * (within if np.isfinite(within) else 0.0), design)


def promote_probability(
    rows: int, goal: Goal, spread: Spread, seeds: int, gates: GatesConfig
) -> float:
    """Chance that a candidate of the goal's gain is promoted, costs aside.

    Quality: the lower limit above the margin. Slices: none is held to be outlying or to spread, and
    each large one excludes a severe loss by itself. Metrics other than those tested are not counted.
    """
    variance, k = spread.per_row(seeds), goal.slices
    units = rows / spread.design_effect
    if min(units, units / max(k, 1)) < gates.min_items:
        return 0.0
    level = gates.alpha / (2 * goal.hypotheses)
    se = sqrt(variance / rows)
    chance = float(ndtr((goal.gain_points - gates.quality_margin) / se + ndtri(level)))
    if k:
        margin = max(gates.severe_loss_points, gates.slice_margin_points)
        if rows / k >= gates.severe_loss_examples:
            part = float(ndtr((goal.gain_points + margin) / (se * sqrt(k)) + ndtri(gates.alpha)))
            chance *= part**k
        if k > 1:
            chance *= (1 - OUTLYING_LEVEL) * (1 - SPREAD_LEVEL / 2)
    return chance


def rows_to_promote(goal: Goal, spread: Spread, seeds: int, gates: GatesConfig) -> int | None:
    """Fewest rows with which it is promoted with the power of `gates`; None: not within ten million,
    or the gain lies within the margin."""
    if goal.gain_points <= gates.quality_margin:
        return None
    rows = max(gates.min_items, 1)
    while rows <= MOST_ROWS:
        if promote_probability(rows, goal, spread, seeds, gates) >= gates.power:
            return _first(rows, goal, spread, seeds, gates)
        rows = ceil(rows * 1.02) + 1
    return None


def rows_to_reject(spread: Spread, seeds: int, gates: GatesConfig) -> int:
    """Rows with which a candidate without any gain is rejected with the power of `gates`: its upper
    limit falls below the smallest useful gain."""
    useful = max(gates.useful_gain_points, gates.quality_margin)
    z = float(ndtri(1 - gates.alpha / 2) + ndtri(gates.power))
    rows = z**2 * spread.per_row(seeds) / useful**2
    return max(gates.min_items, ceil(rows))


def _first(rows: int, goal: Goal, spread: Spread, seeds: int, gates: GatesConfig) -> int:
    """The step before `rows` was too small: the first between that is enough."""
    previous = int((rows - 1) / 1.02) - 2
    for n in range(max(previous, gates.min_items), rows):
        if promote_probability(n, goal, spread, seeds, gates) >= gates.power:
            return n
    return rows
