"""Orders from scores, and one order from several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RRF_K = 60


def best(scores: NDArray[np.floating], k: int, above: float = -np.inf) -> list[int]:
    """Positions of the k largest scores > `above`, best first; ties in order of position.

    Exact in its ties: the same scores give the same order, whatever k.
    """
    found = np.arange(len(scores)) if above == -np.inf else np.flatnonzero(scores > above)
    if len(found) > k:
        values = scores[found]
        least = np.partition(values, len(found) - k)[len(found) - k]
        surely = found[values > least]
        found = np.concatenate([surely, found[values == least][: k - len(surely)]])
    order = np.lexsort((found, -scores[found]))
    return found[order].tolist()


def reciprocal_rank(rankings: Sequence[Sequence[int]], k: int = RRF_K) -> list[tuple[int, float]]:
    """Fuse rankings: score(d) = sum over rankings of 1 / (k + rank of d), rank 1 = best.

    (Cormack, Clarke & Buettcher, "Reciprocal Rank Fusion", SIGIR 2009, with its k = 60.) What a
    ranking does not hold gets nothing from it. Ties go to the smaller position.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1.0 / (k + rank)
    return sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))
