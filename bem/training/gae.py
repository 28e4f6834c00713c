"""Generalized advantage estimation (arXiv:1506.02438) for decisions of unequal length.

Decision k governs d_k chunks before the next one is taken (a semi-MDP), so the future is discounted
by gamma^d_k, not by gamma:

    delta_k = r_k + gamma^d_k V(s_{k+1}) - V(s_k)
    A_k     = delta_k + gamma^d_k lambda A_{k+1}           cut where an episode ends

`span_rewards` makes r_k of the rewards of its chunks, discounted to the decision: one span of two chunks
is then worth what two spans of one are worth under the same rewards.

Lambda enters once per decision, whatever its length: it weighs after how many *value estimates* to
trust V instead of rewards, and there is one estimate per decision. With lambda^d_k a long span would
rest more on the critic only because it is long, and the policy could change its own credit by
choosing spans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Advantages:
    """What a policy and its critic learn from."""

    advantages: NDArray[np.float64]
    """A_k (steps, ...), not normalised."""
    targets: NDArray[np.float64]
    """A_k + V(s_k) (steps, ...): the lambda-return, which the critic is fitted to."""


def gae(
    rewards: ArrayLike,
    values: ArrayLike,
    durations: ArrayLike,
    terminated: ArrayLike,
    truncated: ArrayLike,
    bootstrap: ArrayLike,
    gamma: float = 0.99,
    lam: float = 0.95,
) -> Advantages:
    """Advantages of decisions laid end to end: episode after episode along the first axis.

    Further axes, if any, are independent streams (environments that run side by side).

    Args:
        rewards: (steps, ...) of each decision, discounted to it: see `span_rewards`.
        values: V at each decision.
        durations: chunks that each decision governed, >= 1.
        terminated: bool, the episode ended here; nothing follows.
        truncated: bool, the episode was cut here though it could have gone on.
        bootstrap: V of the state after a truncated decision; not read elsewhere.
        gamma: discount per chunk, in [0, 1].
        lam: lambda per decision, in [0, 1].
    Raises:
        ValueError: shapes or ranges, a number that is not finite, or a last decision that is neither
            terminated nor truncated (its future would be missing).
    """
    r, v, d = (np.asarray(x, dtype=np.float64) for x in (rewards, values, durations))
    ended, cut = np.asarray(terminated, bool), np.asarray(truncated, bool)
    # a decision that both ends and is cut has ended: its future is worth 0
    after = np.where(cut & ~ended, np.asarray(bootstrap, dtype=np.float64), 0.0)
    _check(r, v, d, ended, cut, after, gamma, lam)
    discount, advantages = gamma**d, np.empty_like(r)
    following, next_value = np.zeros(r.shape[1:]), np.zeros(r.shape[1:])
    for k in range(len(r) - 1, -1, -1):
        last = ended[k] | cut[k]
        delta = r[k] + discount[k] * np.where(last, after[k], next_value) - v[k]
        advantages[k] = delta + discount[k] * lam * np.where(last, 0.0, following)
        following, next_value = advantages[k], v[k]
    return Advantages(advantages, advantages + v)


def span_rewards(rewards: ArrayLike, durations: ArrayLike, gamma: float) -> NDArray[np.float64]:
    """Reward of each decision (decisions,): sum_i gamma^i r_i over its chunks i = 0 .. d-1.

    Args:
        rewards: (chunks,) of every chunk, decision after decision.
        durations: (decisions,) chunks of each decision, >= 1.
        gamma: discount per chunk, in [0, 1].
    Raises:
        ValueError: durations that are not positive or do not add up to the chunks.
    """
    r, d = np.asarray(rewards, dtype=np.float64), np.asarray(durations, dtype=np.int64)
    if r.ndim != 1 or d.ndim != 1 or not (d >= 1).all() or d.sum() != len(r):
        raise ValueError(
            f"durations must be positive and add up to the {r.shape} rewards; got {d.shape} with sum {d.sum()}."
        )
    if not len(d):
        return r
    first = np.cumsum(d) - d
    place = np.arange(len(r)) - np.repeat(first, d)  # of each chunk in its span, from 0
    return np.add.reduceat(gamma**place * r, first)


def _check(r, v, d, ended, cut, after, gamma: float, lam: float) -> None:
    shapes = {x.shape for x in (r, v, d, ended, cut, after)}
    if len(shapes) > 1 or r.ndim == 0 or r.size == 0:
        raise ValueError(f"all arrays must be (steps, ...), not empty and alike; got {shapes}.")
    for name, x in (("rewards", r), ("values", v), ("bootstrap", after)):
        if not np.isfinite(x).all():
            raise ValueError(f"{int((~np.isfinite(x)).sum())} of {name} are not finite.")
    if not (d >= 1).all():
        raise ValueError(f"durations must be at least 1 chunk, got {d.min()}.")
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must lie in [0, 1], got {gamma} and {lam}.")
    if not (ended[-1] | cut[-1]).all():
        raise ValueError(
            "the last decision is neither terminated nor truncated. If the rollout stopped in the "
            "middle of an episode, mark it truncated and give the value of the next state."
        )
