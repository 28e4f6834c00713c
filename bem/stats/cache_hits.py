"""The gate on cache hits: a hit is an entry that was needed, and that the cache really held."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bem.config import GatesConfig
from bem.errors import DataError
from bem.stats.bootstrap import joint_bca
from bem.stats.comparisons import effective_units
from bem.stats.inputs import Floats, cluster_codes, finite, sum_by_cluster
from bem.stats.measurement import Measurement
from bem.stats.verdict import Check
from bem.stats.weights import Statistic


def kv_hit_checks(
    baseline: Measurement, candidate: Measurement, gates: GatesConfig, labels: Sequence[str] | None
) -> list[Check]:
    """Whether as many cache entries are reused as by the baseline, up to a margin.

    Args:
        labels: cluster of each of the baseline's examples; used where each is one request.
    Raises:
        DataError: a fact is missing or impossible.
    """
    sides = [_cache_use(side) for side in (candidate, baseline)]
    if len(sides[0]) != len(sides[1]):
        raise DataError(f"{len(sides[0])} requests cannot be paired with {len(sides[1])}.")
    codes = None
    if len(sides[0]) == baseline.n == candidate.n:  # a request is an example
        sides[0] = sides[0][candidate.aligned_to(baseline.example_ids)]
        codes = cluster_codes(labels, baseline.n)
    columns = np.concatenate(sides, axis=1)
    effective = effective_units(np.ones(len(columns), dtype=bool), codes)
    if effective < gates.min_items:
        reason = f"only {effective:.1f} independent requests; {gates.min_items} are needed."
        return [Check("kv_hit", None, reason)]
    statistic = Statistic("kv_hit", sum_by_cluster(columns, codes), _hit_rate_difference)
    bca = joint_bca([statistic], gates.n_bootstrap, gates.alpha, gates.seed)[0]
    margin = -gates.kv_hit_margin_points / 100
    passed = True if bca.lower >= margin else False if bca.upper < margin else None
    reason = (
        f"hit rate {100 * bca.observed:+.2f} points [{100 * bca.lower:.2f}, "
        f"{100 * bca.upper:.2f}] over {bca.n} independent requests; "
        f"the lower limit may be {100 * margin:g}."
    )
    return [
        Check(
            "kv_hit", passed, reason, value=bca.observed, limit=margin,
            ci_low=bca.lower, ci_high=bca.upper,
        )
    ]  # fmt: skip


def _cache_use(side: Measurement) -> Floats:
    """[requests, 2]: hits and needs, summed over the seeds of each request.

    Raises:
        DataError: a fact is missing, or more was hit than the cache held or the request needed.
    """
    columns = {}
    for name in ("kv_hits", "kv_held", "kv_needed"):
        values = getattr(side, name)
        if values is None:
            raise DataError(f"{side.name} has no {name}.")
        columns[name] = np.atleast_2d(finite(f"{side.name}: {name}", values, (1, 2)))
    hits, held, needed = columns.values()
    if not hits.shape == held.shape == needed.shape:
        raise DataError(f"{side.name}: {', '.join(columns)} differ in shape.")
    if hits.shape[0] == 1 and side.n < hits.shape[1] and hits.shape[1] % side.n == 0:
        raise DataError(
            f"{side.name}: {hits.shape[1]} requests for {side.n} examples: are they seeds of the "
            "same requests? Give kv_hits, kv_held and kv_needed as [seeds, requests]."
        )
    if (hits > np.minimum(held, needed)).any() or hits.min() < 0 or not needed.any():
        raise DataError(
            f"{side.name}: kv_hits must lie between 0 and what the cache held and the request "
            "needed."
        )
    return np.stack([hits.sum(axis=0), needed.sum(axis=0)], axis=1)


def _hit_rate_difference(sums: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]
