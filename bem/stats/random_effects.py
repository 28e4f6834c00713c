"""Estimates of alike groups lend each other strength: a random-effects model and its limits.

    estimate_i = theta_i + error_i,   theta_i ~ (mean, tau^2),   errors with a known covariance

Groups may overlap and share clusters: then their errors are correlated, and every variance below
holds for that covariance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import chdtri, ndtri

from bem.stats.inputs import Floats


@dataclass(frozen=True)
class Shrunk:
    """Each group's effect, shrunk towards the mean of all by what the groups' spread allows."""

    estimates: Floats
    """[groups], in the units of the input; of a group that stands alone its own estimate."""
    se: Floats
    """[groups]; likewise."""
    alone: NDArray[np.bool_]
    """Groups too far from the others to be counted among them: nothing is lent to them."""
    mean: float
    """Inverse-variance mean of the others."""
    spread: float
    """tau: standard deviation between groups."""


def shrink(
    estimates: Floats, covariance: Floats, outlying_level: float, spread_level: float
) -> Shrunk:
    """Random-effects estimates (Viechtbauer 2007) of groups among which single ones may differ.

    A group stands alone if it lies further from the mean of the rest than noise explains: the
    furthest one first, then again without it. For the others

        theta_i = mean + tau^2 / (tau^2 + v_i) (estimate_i - mean)

    with tau^2 from `spread_of`. A group without error (v_i = 0) stands alone too.

    Args:
        estimates: [groups].
        covariance: [groups, groups] of their errors.
        outlying_level: chance that any of the groups is held to be outlying (on one side) when
            all are alike; shared out by Sidak's rule.
        spread_level: chance that alike groups are held to differ at all.
    """
    y, v = estimates, np.diag(covariance)
    pooled = np.flatnonzero(v > 0)
    bound = float(ndtri((1 - outlying_level) ** (1 / max(pooled.size, 1))))
    while pooled.size > 1:
        distances = _distances(y[pooled], covariance[np.ix_(pooled, pooled)])
        if distances.max() <= bound:
            break
        pooled = np.delete(pooled, int(distances.argmax()))
    alone = np.ones(y.size, dtype=bool)
    shrunk, se = y.copy(), np.sqrt(v)
    if pooled.size < 2:
        return Shrunk(shrunk, se, alone, float(y.mean()), 0.0)
    alone[pooled] = False
    inside = covariance[np.ix_(pooled, pooled)]
    tau2 = spread_of(y[pooled], inside, spread_level)
    shrunk[pooled], se[pooled], mean = _predicted(y[pooled], inside, tau2)
    return Shrunk(shrunk, se, alone, mean, float(np.sqrt(tau2)))


def spread_of(estimates: Floats, covariance: Floats, level: float) -> float:
    """tau^2 that the estimates prove: lower one-sided 1 - `level` limit of the Q-profile.

        Q(tau^2) = sum_i w_i (estimate_i - mean)^2,   w_i = 1 / (v_i + tau^2)

    tau^2 solves Q = the 1 - `level` quantile of its law; 0 where Q(0) is below it. For
    uncorrelated errors that law is chi^2 with groups - 1 degrees of freedom (Viechtbauer 2007);
    otherwise (Jackson 2013) it is a sum of weighted chi^2, here by its first two moments
    (Satterthwaite). `level` = 0.5 is the median-unbiased estimate.
    """
    v = np.diag(covariance)

    def excess(tau2: float) -> float:
        w = 1 / (v + tau2)
        q = float(w @ (estimates - w @ estimates / w.sum()) ** 2)
        form = np.diag(w) - np.outer(w, w) / w.sum()
        product = form @ (covariance + tau2 * np.eye(v.size))
        first, second = float(np.trace(product)), float(np.sum(product * product.T))
        if second <= 1e-18:  # one group under several names: no law, and nothing to compare
            return q - 1e-9
        degrees = first**2 / second
        return q - float(chdtri(degrees, level)) * second / first

    if excess(0.0) <= 0:
        return 0.0
    high = float(np.ptp(estimates) ** 2 + v.max())
    while excess(high) > 0:
        high *= 4
    return float(brentq(excess, 0.0, high))  # pyright: ignore[reportArgumentType]


def _distances(y: Floats, covariance: Floats) -> Floats:
    """[groups]: how many standard errors each lies from the inverse-variance mean of the others."""
    weights = 1 / np.diag(covariance)
    shares = np.tile(weights, (y.size, 1))
    np.fill_diagonal(shares, 0.0)
    contrasts = np.eye(y.size) - shares / shares.sum(axis=1, keepdims=True)
    variances = ((contrasts @ covariance) * contrasts).sum(axis=1)
    apart = np.abs(contrasts @ y)
    noise = np.sqrt(np.maximum(variances, 0.0))
    # one group under two names has no noise between them, and no distance but rounding
    tiny = 1e-9 * np.sqrt(np.diag(covariance))
    return np.divide(apart, noise, out=np.where(apart > tiny, np.inf, 0.0), where=noise > tiny)


def _predicted(y: Floats, covariance: Floats, tau2: float) -> tuple[Floats, Floats, float]:
    """Shrunk estimates, the standard errors of their distance to theta_i, and the mean."""
    v = np.diag(covariance)
    w = 1 / (v + tau2)
    w = w / w.sum()
    own = tau2 / (tau2 + v)
    maps: Floats = np.diag(own) + np.outer(1 - own, w).astype(np.float64)  # estimates = maps @ y
    total = covariance + tau2 * np.eye(y.size)
    squares = ((maps @ total) * maps).sum(axis=1) + tau2 - 2 * tau2 * np.diag(maps)
    return maps @ y, np.sqrt(np.maximum(squares, 0.0)), float(w @ y)
