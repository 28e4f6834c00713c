"""Streams of scores whose truth is known: what `drift.py` is measured on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.signal import lfilter

PERIOD = 1000
"""Scores in a day of the daily rhythm."""


def gaussian(n: int, rng: np.random.Generator) -> np.ndarray:
    """Mean .7, standard deviation .1."""
    return rng.normal(0.7, 0.1, n)


def bernoulli(n: int, rng: np.random.Generator) -> np.ndarray:
    """Right in 70 %."""
    return (rng.random(n) < 0.7).astype(float)


def skewed(n: int, rng: np.random.Generator) -> np.ndarray:
    """Most scores good, a long tail of bad ones: beta(6, 1), skewness -1.5."""
    return rng.beta(6, 1, n)


def autoregressive(n: int, rng: np.random.Generator) -> np.ndarray:
    """AR(1) with coefficient .5; mean .7, standard deviation .1."""
    noise = rng.normal(0, 1, n)
    noise[1:] *= np.sqrt(0.75)
    return 0.7 + 0.1 * lfilter([1.0], [1.0, -0.5], noise)


def constant(n: int, rng: np.random.Generator) -> np.ndarray:
    """Always .7."""
    return np.full(n, 0.7)


def daily(n: int, rng: np.random.Generator) -> np.ndarray:
    """A sine of amplitude .2 sd, with a phase of its own, over noise."""
    phase = rng.uniform(0, 2 * np.pi)
    return (
        0.7 + 0.1 * rng.normal(0, 1, n) + 0.02 * np.sin(2 * np.pi * np.arange(n) / PERIOD + phase)
    )


STREAMS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "gaussian": gaussian,
    "bernoulli": bernoulli,
    "skewed": skewed,
    "ar1": autoregressive,
    "constant": constant,
    "daily": daily,
}
SD = {"gaussian": 0.1, "bernoulli": 0.21**0.5, "skewed": (6 / (49 * 8)) ** 0.5, "ar1": 0.1,
      "constant": 0.1, "daily": 0.1}  # fmt: skip
"""Of a score; the constant one falls by as much as the Gaussian one."""
