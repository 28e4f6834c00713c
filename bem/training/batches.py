"""How the rows of an optimiser step are cut into micro-batches, so that little is spent on padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def micro_batches(lengths: Sequence[int], least: int, padding: float) -> list[list[int]]:
    """Rows of each micro-batch, by their place in `lengths`: neighbours in length, shortest first.

    As few micro-batches as keep padding within `padding`, but at least `least`, cut where the sum of
    rows x longest row is smallest (exact, by dynamic programming over the rows in order of length).
    With a loss that is divided by the step's own count the gradient is the same however it is cut.

    Args:
        lengths: tokens of each row, at least one.
        least: micro-batches at least (as many as there are rows at most).
        padding: largest share of the computed tokens that may be padding, in [0, 1].
    """
    if not lengths:
        return []
    order = np.argsort(lengths, kind="stable")
    sizes = np.asarray(lengths)[order]
    n, real = len(sizes), sizes.sum()
    starts, stops = np.arange(n)[:, None], np.arange(1, n + 1)
    area = np.where(starts < stops, (stops - starts) * sizes.astype(float), np.inf)
    cost = area[
        0
    ]  # computed tokens of the first 1 ... n rows in so many micro-batches as there are
    begins: list[np.ndarray] = []  # of each further micro-batch: where it begins, by where it ends
    while len(begins) + 1 < min(least, n) or cost[-1] * (1 - padding) > real:
        total = np.concatenate([[np.inf], cost[:-1]])[:, None] + area
        begins.append(total.argmin(0))
        cost = total.min(0)
    cuts = [n]
    for begin in reversed(begins):
        cuts.append(int(begin[cuts[-1] - 1]))
    ends = cuts[::-1]
    return [order[a:b].tolist() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
