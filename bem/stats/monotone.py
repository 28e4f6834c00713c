"""Does quality fall with the evidence? score(clean) >= score(corrupt) >= score(shuffled)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from bem.config import GatesConfig
from bem.stats.bootstrap import joint_bca
from bem.stats.comparisons import kish
from bem.stats.inputs import Floats, cluster_codes, over_seeds, sum_by_cluster
from bem.stats.weights import Statistic, ratio

CONDITIONS = ("clean", "corrupt", "shuffled")
"""From the best index to the worst."""
OFF = "off"
"""No passages at all: beside the order, because a bad passage may be worse than none."""
P_FLOOR = 1e-12
"""Rounding of the trend test's law: no smaller p-value is stated."""


@dataclass(frozen=True)
class Step:
    """One condition against the next worse one."""

    better: str
    worse: str
    passed: bool | None
    """True: the better index surely does not score lower; False: it surely does; None: not decided."""
    reason: str
    difference: float | None = None
    """Mean score with the better index minus that with the worse."""
    ci_low: float | None = None
    ci_high: float | None = None


@dataclass(frozen=True)
class IndexSwap:
    """Whether scores follow the quality of the index, step by step and as a trend."""

    means: Mapping[str, float]
    """Mean score of each condition that was measured."""
    steps: tuple[Step, ...]
    spearman: float | None
    """Mean rank correlation of an example's scores with the order of the conditions; an example
    with equal scores counts as 0. None: not all conditions were measured."""
    p_value: float | None
    """One-sided, Page's trend test: H0 the index does not matter."""
    ablation: Step | None
    """Clean against no passages, if that was measured; no part of `monotone`."""
    n: int
    """Independent units: examples, or clusters."""
    monotone: bool | None
    """True: all steps passed, and the trend is significant (equal scores are no proof); False: a
    step failed; None: not decided."""
    follows: bool
    """The trend is significant, on enough units."""


def index_swap(
    scores: Mapping[str, ArrayLike],
    clusters: Sequence[Any] | None = None,
    gates: GatesConfig | None = None,
) -> IndexSwap:
    """Judge scores of the same examples with a clean, a corrupt and a shuffled index.

    Args:
        scores: clean, corrupt, shuffled and perhaps off -> [examples] or [seeds, examples] (then
            averaged); higher is better.
        clusters: label per example; examples of one cluster are not independent.
        gates: level, resamples, seed and the fewest units that can decide; None: the defaults.
    Raises:
        DataError: NaN or inf (with its index), or labels that do not match the examples.
    """
    gates = gates or GatesConfig()
    rows = {c: over_seeds(f"index_swap.{c}", scores[c]) for c in (*CONDITIONS, OFF) if c in scores}
    units = {c: _units(row, clusters) for c, row in rows.items()}
    steps = tuple(_step(better, worse, units, gates) for better, worse in pairwise(CONDITIONS))
    spearman = p_value = None
    ablation = _step(CONDITIONS[0], OFF, units, gates) if OFF in rows else None
    if all(c in rows and rows[c].size == rows[CONDITIONS[0]].size for c in CONDITIONS):
        spearman = trend(np.stack([rows[c] for c in CONDITIONS], axis=1))
        means = [units[c][:, 0] / units[c][:, 1] for c in CONDITIONS]
        p_value = page_test(np.stack(means, axis=1))
    passed = [step.passed for step in steps]
    n = max((len(u) for u in units.values()), default=0)
    enough = all(kish(u[:, 1]) >= gates.min_items for u in units.values())
    follows = p_value is not None and p_value <= gates.alpha and enough
    monotone = False if False in passed else True if all(passed) and follows else None
    means_of = {c: float(row.mean()) for c, row in rows.items()}
    return IndexSwap(means_of, steps, spearman, p_value, ablation, n, monotone, follows)


def trend(table: Floats) -> float:
    """Mean Spearman correlation of the rows' values with columns that run from best to worst.

    Args:
        table: [examples, conditions]; a row of equal values counts as 0.
    """
    ranks = _ranks(table)
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    order = np.arange(table.shape[1], 0, -1) - (table.shape[1] + 1) / 2
    norms = np.sqrt((centred**2).sum(axis=1) * (order**2).sum())
    along = centred @ order
    return float(np.divide(along, norms, out=np.zeros_like(along), where=norms > 0).mean())


def page_test(table: Floats) -> float:
    """One-sided p of Page's trend test (1963): L = sum over rows of order . ranks is this large.

    Under H0 the ranks of each row stand in random order. The law of L is exact for any number of
    rows and for ties: that of one row is listed, and laws of rows are convolved through their
    Fourier transforms. `scipy.stats.page_trend_test` agrees where nothing is tied; with ties it
    keeps the law of untied ranks, so that on exact match (most rows tied) it rarely finds a trend.

    Args:
        table: [units, conditions], columns from best to worst.
    """
    doubled = np.rint(2 * _ranks(table)).astype(np.int64)  # tied ranks are halves
    k = table.shape[1]
    order = np.arange(k - 1, -k, -2)  # k-1, k-3, ... 1-k: whole numbers that sum to 0
    observed = int((doubled @ order).sum())
    kinds, counts = np.unique(np.sort(doubled, axis=1), axis=0, return_counts=True)
    laws = [np.array([order @ p for p in permutations(kind)]) for kind in kinds]
    reach = sum(int(law.max()) * int(n) for law, n in zip(laws, counts, strict=True))
    size = 2 * reach + 1
    product = np.ones(size // 2 + 1, dtype=complex)
    for law, n in zip(laws, counts, strict=True):
        one = np.bincount(law % size, minlength=size) / len(law)
        product *= np.fft.rfft(one) ** int(n)
    density = np.fft.irfft(product, size)
    values = np.arange(observed, reach + 1)
    return float(min(1.0, max(P_FLOOR, density[values % size].sum())))


def _step(better: str, worse: str, units: Mapping[str, Floats], gates: GatesConfig) -> Step:
    if better not in units or worse not in units or len(units[better]) != len(units[worse]):
        reason = "cannot be computed: needs both, on the same examples."
        return Step(better, worse, None, reason)
    a, b = units[better], units[worse]
    effective = kish(a[:, 1])
    if effective < gates.min_items:
        reason = (
            f"{len(a)} examples or clusters count as {effective:.1f} of equal size; "
            f"at least {gates.min_items} are needed."
        )
        return Step(better, worse, None, reason)
    columns = np.stack([a[:, 0] - b[:, 0], a[:, 1]], axis=1)
    statistic = Statistic(f"{better}>={worse}", columns, ratio)
    bca = joint_bca([statistic], gates.n_bootstrap, gates.alpha, gates.seed)[0]
    passed = True if bca.lower >= 0 else False if bca.upper < 0 else None
    interval = f"[{bca.lower:.4f}, {bca.upper:.4f}]"
    reason = f"difference {bca.observed:+.4f} {interval}, the lower limit may not be negative."
    return Step(better, worse, passed, reason, bca.observed, bca.lower, bca.upper)


def _units(row: Floats, clusters: Sequence[Any] | None) -> Floats:
    """[units, 2]: sum of scores and number of examples of each cluster."""
    columns = np.stack([row, np.ones_like(row)], axis=1)
    return sum_by_cluster(columns, cluster_codes(clusters, row.size))


def _ranks(table: Floats) -> NDArray[np.float64]:
    """Ranks within rows, ties averaged; values that differ by rounding only are tied."""
    return np.asarray(rankdata(np.round(table, 9), axis=1))
