"""The best route in hindsight: which expert should have governed which chunk (Viterbi, 1967).

    V(t, e) = loss(t, e) + min( V(t + 1, e),  switch_cost + min_f V(t + 1, f) )       V(chunks, .) = 0

V is the least cost from chunk t on when expert e governs t, so Q*(t, e) = -V(t, e) is what a critic
that knew the future would say (the price of getting to e is not in it). Exact, in
chunks x experts steps, for any number of sequences at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class OraclePath:
    """The cheapest path of each sequence."""

    path: NDArray[np.int64]
    """Expert of each chunk (..., chunks)."""
    cost: NDArray[np.float64]
    """Losses along the path plus switch_cost per change (...)."""
    cost_to_go: NDArray[np.float64]
    """V above (..., chunks, experts); inf where an expert is not allowed."""


def best_path(
    losses: ArrayLike,
    switch_cost: float,
    fixed: ArrayLike | None = None,
    allowed: ArrayLike | None = None,
    real: ArrayLike | None = None,
) -> OraclePath:
    """Path that minimises sum_t losses[t, path[t]] + switch_cost * (number of changes).

    Among equally cheap paths it stays with the active expert for as long as it can: where nobody
    has a loss (a user's text) it switches at the end, when a router has seen most. The first chunk
    is free to choose; of equal experts it takes the first.

    Args:
        losses: (..., chunks, experts), finite, for instance summed nats of the chunk's answer tokens.
        switch_cost: >= 0, in the units of `losses`.
        fixed: expert that must govern a chunk (..., chunks), -1: free.
        allowed: bool (..., chunks, experts); default: all.
        real: bool (..., chunks); a False chunk is padding: no loss, no restriction.
    Raises:
        ValueError: shapes, losses that are not finite, or a chunk that no expert may govern.
    """
    values = np.asarray(losses, dtype=np.float64)
    _check(values, switch_cost)
    present = np.broadcast_to(True if real is None else np.asarray(real, bool), values.shape[:-1])
    possible = _possible(values.shape, fixed, allowed) | ~present[..., None]
    if not possible.any(-1).all():
        where = tuple(np.argwhere(~possible.any(-1))[0].tolist())
        raise ValueError(f"no expert may govern chunk {where}: `allowed` and `fixed` exclude all.")
    values = np.where(possible, np.where(present[..., None], values, 0.0), np.inf)
    # Backwards over regrets: where all losses are equal they are exactly 0, so ties stay exact.
    least = values.min(-1)
    regret_to_go = _regret_to_go(values - least[..., None], switch_cost)
    path = _follow(regret_to_go, switch_cost)
    cost_to_go = regret_to_go + np.cumsum(least[..., ::-1], -1)[..., ::-1, None]
    cost = np.take_along_axis(cost_to_go[..., 0, :], path[..., :1], -1)[..., 0]
    return OraclePath(path, cost, cost_to_go)


def _regret_to_go(regrets: NDArray, switch_cost: float) -> NDArray:
    to_go = regrets.copy()
    for t in range(regrets.shape[-2] - 2, -1, -1):
        after = to_go[..., t + 1, :]
        switched = switch_cost + after.min(-1, keepdims=True)
        to_go[..., t, :] += np.minimum(after, switched)
    return to_go


def _follow(to_go: NDArray, switch_cost: float) -> NDArray[np.int64]:
    """Forwards through the cost to go; leaves the active expert only for a strictly cheaper one."""
    path = np.empty(to_go.shape[:-1], dtype=np.int64)
    path[..., 0] = to_go[..., 0, :].argmin(-1)
    for t in range(1, to_go.shape[-2]):
        here, active = to_go[..., t, :], path[..., t - 1]
        stay = np.take_along_axis(here, active[..., None], -1)[..., 0]
        path[..., t] = np.where(here.min(-1) + switch_cost < stay, here.argmin(-1), active)
    return path


def _possible(
    shape: tuple[int, ...], fixed: ArrayLike | None, allowed: ArrayLike | None
) -> NDArray[np.bool_]:
    possible = np.broadcast_to(True if allowed is None else np.asarray(allowed, bool), shape)
    if fixed is None:
        return possible
    experts = np.broadcast_to(np.asarray(fixed), shape[:-1])[..., None]
    if experts.min() < -1 or experts.max() >= shape[-1]:
        raise ValueError(
            f"fixed names experts {experts.min()} to {experts.max()}; there are {shape[-1]} "
            "(0-based; -1: free)."
        )
    numbers = np.arange(shape[-1])
    return possible & ((experts == -1) | (experts == numbers))


def _check(values: NDArray, switch_cost: float) -> None:
    if values.ndim < 2 or 0 in values.shape:
        raise ValueError(f"losses must be (..., chunks, experts), none empty; got {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError(
            f"{int((~np.isfinite(values)).sum())} losses are not finite. "
            "An expert that cannot be used belongs in `allowed`."
        )
    if not 0 <= switch_cost < np.inf:
        raise ValueError(f"switch_cost must be finite and >= 0, got {switch_cost}.")
