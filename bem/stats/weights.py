"""Exact multinomial bootstrap weights, fast and in bounded memory, and sums of columns under
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, factorial, sqrt

import numpy as np
from numpy.typing import NDArray

from bem.stats.inputs import ROUNDING, Floats

CELLS = 1 << 20
"""Weights per block: a few MiB of working memory whatever n and B are."""
BUFFER_ROWS = 1024
"""Resamples whose sums are held at once before the statistics are taken."""
PIECE = 1 << 16
"""Weights that are converted and multiplied at once: a quarter MiB of float32."""
SMALL = 200
"""Below this many units index draws are as fast as Poisson counts, and simpler."""
TOP_UP = 2.0
"""Poisson rate is 1 - TOP_UP / sqrt(n): few rows overshoot n, few units have to be topped up."""


@dataclass(frozen=True)
class Statistic:
    """A smooth function of sums: theta = of(sum over units of columns).

    It must not change when all sums are scaled alike, so that leaving a unit out needs no care.
    """

    name: str
    columns: Floats
    """[n, k] summands of each example (of each cluster once summed)."""
    of: Callable[[Floats], Floats]
    """[..., k] sums to [...] values."""


def ratio(sums: Floats) -> Floats:
    """Column 0 over column 1: a mean over a cluster sample or a slice. NaN where nothing was
    drawn."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0.5, sums[..., 0] / sums[..., 1], np.nan)


def resample(statistics: Sequence[Statistic], n_bootstrap: int, seed: int) -> Floats:
    """[n_bootstrap, S]: every statistic on the same resamples of the same units.

    Joint resampling of metrics, variants and slices for the price of one: one weight block, one
    float32 matrix product with all columns side by side (centred and scaled first: rounding is
    about 1e-6 of a standard error). The resamples depend on (n, n_bootstrap, seed) alone."""
    columns = np.concatenate([s.columns for s in statistics], axis=1)
    ends = np.cumsum([s.columns.shape[1] for s in statistics])
    values = np.empty((n_bootstrap, len(statistics)))
    done = 0
    for sums in _resampled_sums(columns, n_bootstrap, seed):
        stop = done + len(sums)
        for j, statistic in enumerate(statistics):
            first = ends[j] - statistic.columns.shape[1]
            values[done:stop, j] = statistic.of(sums[:, first : ends[j]])
        done = stop
    return values


def _resampled_sums(columns: Floats, n_bootstrap: int, seed: int) -> Iterator[Floats]:
    """Blocks [rows, k] of column sums over resamples; n_bootstrap rows in all."""
    n = len(columns)
    centre, spread = columns.mean(axis=0), columns.std(axis=0)
    live = np.flatnonzero(spread > ROUNDING * np.abs(centre))  # others always sum to n * centre
    scaled = np.ascontiguousarray((columns - centre)[:, live] / spread[live], dtype=np.float32)
    buffer, held = np.tile(n * centre, (BUFFER_ROWS, 1)), 0
    for weights in weight_blocks(n, n_bootstrap, seed):
        for start in range(0, len(weights), BUFFER_ROWS):
            part = weights[start : start + BUFFER_ROWS]
            if held + len(part) > BUFFER_ROWS:
                yield buffer[:held]
                held = 0
            sums = _product(part, scaled) * spread[live] + n * centre[live]
            buffer[held : held + len(part), live] = sums
            held += len(part)
    yield buffer[:held]


def _product(weights: NDArray, columns: NDArray[np.float32]) -> Floats:
    """weights @ columns, converted to float32 piece by piece so that each stays in the cache."""
    rows, n = weights.shape
    step = max(1, PIECE // rows)
    work = np.empty((rows, min(step, n)), np.float32)
    sums = np.zeros((rows, columns.shape[1]))
    for start in range(0, n, step):
        part = weights[:, start : start + step]
        piece = work[:, : part.shape[1]]
        np.copyto(piece, part)
        sums += piece @ columns[start : start + step]
    return sums


def weight_blocks(n: int, n_bootstrap: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Blocks [rows, n] of Multinomial(n; 1/n, ..., 1/n) weights; n_bootstrap rows in all.

    Every block has its own generator, seeded by (seed, block number): the answer does not depend on
    who consumes the blocks, or when. A block is valid until the next one is asked for.
    """
    rows = max(1, min(n_bootstrap, CELLS // n))
    draw = _draw_by_index if n < SMALL else _PoissonTopUp(n, rows)
    for number, start in enumerate(range(0, n_bootstrap, rows)):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, number])))
        yield draw(n, min(rows, n_bootstrap - start), rng)


def _draw_by_index(n: int, rows: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    drawn = rng.integers(0, n, (rows, n))
    drawn += np.arange(rows)[:, None] * n
    return np.bincount(drawn.ravel(), minlength=rows * n).astype(np.uint8).reshape(rows, n)


class _PoissonTopUp:
    """Multinomial rows from iid Poisson counts: comparing bytes, not a binomial draw per weight.

    Poisson(r) counts given their sum N are Multinomial(N, uniform), whatever r is; adding n - N
    uniform draws makes them Multinomial(n, uniform). Rows with N > n are drawn again, which
    conditions on N only, so the law stays exact.

    Counts come from random bytes: the Poisson law is split into a part whose probabilities are
    multiples of 1/256, read off by comparing bytes (SIMD), and a small rest that the last few byte
    values stand for. Only those cells draw again, from 16 bits; the rounding of the rest is the one
    approximation, below 2^-22 in any probability.
    """

    def __init__(self, n: int, rows: int):
        self.steps, self.last, self.rest = _split_poisson(1.0 - TOP_UP / sqrt(n))
        self.counts = np.empty(rows * n, np.uint8)
        self.above = np.empty(rows * n, np.bool_)

    def __call__(self, n: int, rows: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        table = self._poisson(self.counts[: rows * n], rng).reshape(rows, n)
        missing = n - table.sum(axis=1, dtype=np.uint32).astype(np.int64)
        while (over := np.flatnonzero(missing < 0)).size:  # a fraction Phi(-TOP_UP) of the rows
            again = self._poisson(np.empty(over.size * n, np.uint8), rng).reshape(-1, n)
            table[over] = again
            missing[over] = n - again.sum(axis=1, dtype=np.uint32).astype(np.int64)
        at = rng.integers(0, n, int(missing.sum()))
        at += np.repeat(np.arange(rows) * n, missing)
        np.add.at(table.reshape(-1), at, np.uint8(1))
        return table

    def _poisson(self, counts: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Fills `counts` with Poisson draws."""
        uniform = _random_words(rng, counts.size, np.uint8)
        above = self.above[: counts.size]
        _count_steps(uniform, self.steps, counts, above)
        np.greater_equal(uniform, self.last, out=above)
        again = np.flatnonzero(above)
        redrawn, scratch = np.empty(again.size, np.uint8), np.empty(again.size, np.bool_)
        _count_steps(_random_words(rng, again.size, np.uint16), self.rest, redrawn, scratch)
        counts[again] = redrawn
        return counts


def _random_words(rng: np.random.Generator, count: int, dtype: type) -> NDArray:
    """`count` uniform words of one or two bytes, straight from the generator's 64-bit output."""
    per_draw = 8 // np.dtype(dtype).itemsize
    raw = np.asarray(rng.bit_generator.random_raw(count // per_draw + 1))  # type: ignore
    return raw.view(dtype)[:count]


def _count_steps(
    uniform: NDArray, steps: NDArray, counts: NDArray[np.uint8], above: NDArray[np.bool_]
) -> None:
    """counts = number of steps <= uniform, in place."""
    np.greater_equal(uniform, steps[0], out=above)
    np.copyto(counts, above.view(np.uint8))
    for step in steps[1:]:
        np.greater_equal(uniform, step, out=above)
        np.add(counts, above.view(np.uint8), out=counts)


def _split_poisson(rate: float) -> tuple[NDArray[np.uint8], np.uint8, NDArray[np.uint16]]:
    """Steps of the whole 1/256ths of the law, first byte of the rest, and the 16-bit steps of it."""
    law = np.array([exp(-rate) * rate**k / factorial(k) for k in range(30)]) * 256
    whole = np.floor(law)
    steps = np.cumsum(whole)[: np.count_nonzero(whole) - 1]
    rest = np.cumsum(law - whole)
    rest_steps = np.rint(rest / rest[-1] * 65536)
    return (
        steps.astype(np.uint8),
        np.uint8(whole.sum()),
        rest_steps[rest_steps < 65536].astype(np.uint16),
    )
