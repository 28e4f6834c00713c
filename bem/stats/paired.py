"""Exact paired tests: sign flips of differences (McNemar's test on exact match) and swaps of
corpora."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bem.stats.inputs import Floats, cluster_codes, finite, over_seeds, sum_by_cluster
from bem.stats.laws import as_lattice

CELLS = 1 << 18
"""Signs per block."""
ENUMERATE = 13
"""Up to this many units all 2^n sign patterns are tried."""
TIE = 1e-5
"""Statistics closer than this many standard deviations are ties (float32 sums)."""


@dataclass(frozen=True)
class SignFlip:
    """P-values of a randomisation test whose null is symmetry about the margin."""

    p_value: float
    """Two-sided."""
    p_greater: float
    p_less: float
    n: int
    n_discordant: int
    """Units that differ from the margin; only they carry evidence."""
    method: str
    """exact | enumeration | monte_carlo"""


def sign_flip_test(
    differences: ArrayLike,
    *,
    clusters: Sequence[Any] | None = None,
    margin: float = 0.0,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> SignFlip:
    """Whether paired differences are symmetric about `margin` (Fisher 1935).

    T = sum_i e_i (d_i - margin), e_i = +-1 with equal chance; whole clusters flip together.
    Discrete scores get the exact law of T for any n by Fourier inversion of prod_i cos(|d_i| t): on
    exact match this is the exact McNemar test. Otherwise p = (1 + #{T* >= T}) / (1 + n_resamples),
    a valid level.

    Args:
        differences: [examples] or [seeds, examples] (averaged over seeds).
    """
    d = over_seeds("differences", differences) - margin
    codes = cluster_codes(clusters, d.size)
    return sign_flip_tests(sum_by_cluster(d[:, None], codes), n_resamples, seed)[0]


def sign_flip_tests(columns: Floats, n_resamples: int = 10_000, seed: int = 0) -> list[SignFlip]:
    """The same for every column of [units, k]; columns that need Monte Carlo share their signs."""
    n = len(columns)
    tests: list[SignFlip | None] = [_exact(column) for column in columns.T]
    rest = [j for j, test in enumerate(tests) if test is None]
    if rest:
        # first at most 1 in size, so that differences of 1e-300 have a square
        unit = columns[:, rest] / np.abs(columns[:, rest]).max(axis=0)
        unit /= np.sqrt((unit**2).sum(axis=0))
        observed = unit.sum(axis=0)
        blocks = [signs @ unit.astype(np.float32) for signs in sign_blocks(n, n_resamples, seed)]
        drawn = np.concatenate(blocks).astype(np.float64)
        for i, j in enumerate(rest):
            tests[j] = _counted(
                drawn[:, i], observed[i], TIE, n, int(np.count_nonzero(columns[:, j]))
            )
    return [test for test in tests if test is not None]


def swap_test(
    candidate: Floats,
    baseline: Floats,
    of: Callable[[Floats], Floats],
    *,
    clusters: Sequence[Any] | None = None,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> SignFlip:
    """Approximate randomisation for corpus scores (Noreen 1989): examples change sides at random.

    Args:
        candidate, baseline: sufficient statistics [seeds, n, k]; all seeds of an example swap
            together.
        of: corpus score from summed statistics, [..., k] to [...]; averaged over seeds.
    """
    seeds, n, k = candidate.shape
    codes = cluster_codes(clusters, n)
    half = sum_by_cluster(_flat(candidate - baseline) / 2, codes)
    total = _flat(candidate + baseline).sum(axis=0) / 2

    def effect(flipped: Floats) -> Floats:
        sides = [of((total + s * flipped).reshape(*flipped.shape[:-1], seeds, k)) for s in (1, -1)]
        return (sides[0] - sides[1]).mean(axis=-1)

    observed = float(effect(half.sum(axis=0)[None])[0])
    blocks = sign_blocks(len(half), n_resamples, seed)
    drawn = np.concatenate([effect(signs.astype(np.float64) @ half) for signs in blocks])
    discordant = int(np.any(half != 0, axis=1).sum())
    return _counted(drawn, observed, TIE * float(drawn.std()), len(half), discordant)


def variance_components(scores: ArrayLike) -> tuple[float, float]:
    """Variance between examples and between seeds within an example, of scores [seeds, n].

    Averaging over K seeds leaves var_examples + var_seeds / K (Miller 2024, arXiv:2411.00640). The
    first is corrected for the second and not below 0. One seed: the second is unknown (NaN)."""
    table = finite("scores", scores, 2)
    seeds = len(table)
    within = float(table.var(axis=0, ddof=1).mean()) if seeds > 1 else float("nan")
    between = float(table.mean(axis=0).var(ddof=1)) if table.shape[1] > 1 else float("nan")
    return (max(between - within / seeds, 0.0) if seeds > 1 else between), within


def sign_blocks(n: int, n_resamples: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """Blocks [rows, n] of independent fair signs; every pattern once if there are few units."""
    if n <= ENUMERATE:
        patterns = (np.arange(1 << n)[:, None] >> np.arange(n)) & 1
        yield patterns.astype(np.float32) * 2 - 1
        return
    rows = max(1, min(n_resamples, CELLS // n))
    for number, start in enumerate(range(0, n_resamples, rows)):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, number])))
        count = min(rows, n_resamples - start)
        bits = np.unpackbits(
            np.frombuffer(rng.bytes((count * n + 7) // 8), np.uint8), count=count * n
        )
        signs = bits.astype(np.float32).reshape(count, n)
        signs *= 2
        signs -= 1
        yield signs


def _exact(d: Floats) -> SignFlip | None:
    """Exact law of the sum for scores on a lattice; None for continuous ones."""
    apart = d[d != 0]
    if apart.size == 0:
        return SignFlip(1.0, 1.0, 1.0, d.size, 0, "exact")
    lattice = as_lattice(np.append(apart, 0.0))
    if lattice is None:
        return None
    codes = (lattice.codes + lattice.start)[:-1]
    sizes, counts = np.unique(np.abs(codes), return_counts=True)
    half = int(min(sizes @ counts, 20 * sqrt(float(sizes**2 @ counts)) + 16 * sizes.max())) + 1
    angles = 2 * np.pi * np.arange(half + 1) / (2 * half)
    transform = np.ones(half + 1)
    for size, count in zip(sizes, counts, strict=True):
        transform *= np.cos(angles * size) ** count
    law = np.fft.irfft(transform, 2 * half).clip(min=0.0)  # law[s] = P(T = s modulo 2 * half)
    observed = int(codes.sum())
    tail = float(law[abs(observed) : half + 1].sum()) if abs(observed) <= half else 0.0
    near = min(max(tail, 1e-12), 1.0)
    far = min(1.0, 1.0 - near + (float(law[abs(observed)]) if abs(observed) <= half else 0.0))
    greater, less = (near, far) if observed >= 0 else (far, near)
    return SignFlip(min(1.0, 2 * near), greater, less, d.size, apart.size, "exact")


def _counted(drawn: Floats, observed: float, eps: float, n: int, discordant: int) -> SignFlip:
    """P-values from drawn statistics; the observed one counts as drawn unless all were
    enumerated."""
    own = 0 if n <= ENUMERATE else 1
    total = drawn.size + own
    greater = (int(np.count_nonzero(drawn >= observed - eps)) + own) / total
    less = (int(np.count_nonzero(drawn <= observed + eps)) + own) / total
    method = "monte_carlo" if own else "enumeration"
    return SignFlip(min(1.0, 2 * min(greater, less)), greater, less, n, discordant, method)


def _flat(statistics: Floats) -> Floats:
    """[seeds, n, k] to [n, seeds * k]."""
    seeds, n, k = statistics.shape
    return statistics.transpose(1, 0, 2).reshape(n, seeds * k)
