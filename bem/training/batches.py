"""How the rows of an optimiser step are cut into micro-batches, so that little is spent on padding."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

MOST_PADDING = 0.1
"""Share of the tokens of a step that may be padding."""


def micro_batches(
    lengths: Sequence[int], least: int, padding: float = MOST_PADDING
) -> list[list[int]]:
    """Rows of each micro-batch, by their place in `lengths`: neighbours in length, shortest first.

    As few micro-batches as keep padding within `padding`, but at least `least`, cut where the sum of
    rows x longest row is smallest. With a loss that is divided by the step's own count the gradient
    is the same however it is cut.

    Args:
        lengths: tokens of each row.
        least: micro-batches at least (as many as there are rows at most).
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    sizes = [lengths[i] for i in order]
    least, real = min(least, len(sizes)), sum(sizes)
    cost = [inf, *(stop * sizes[stop - 1] for stop in range(1, len(sizes) + 1))]
    froms: list[list[int]] = []  # of each further micro-batch: where it begins, by where it ends
    while len(froms) + 1 < least or cost[-1] * (1 - padding) > real:
        froms.append([])
        cost = _one_more(cost, sizes, froms[-1])
    cuts = [len(sizes)]
    for begins in reversed(froms):
        cuts.append(begins[cuts[-1]])
    ends = cuts[::-1]
    return [order[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _one_more(cost: list[float], sizes: Sequence[int], begins: list[int]) -> list[float]:
    """Smallest padded size of the first rows in one micro-batch more; none is empty."""
    new: list[float] = [inf]
    begins.append(0)
    for stop in range(1, len(sizes) + 1):
        best = min(range(stop), key=lambda start: cost[start] + (stop - start) * sizes[stop - 1])
        new.append(cost[best] + (stop - best) * sizes[stop - 1])
        begins.append(best)
    return new
