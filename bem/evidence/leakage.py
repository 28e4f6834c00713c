"""Is a held-out text nearly a copy of a training text? Then a good score may be memory."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import ceil

_WORD = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+"
)
"""Words; in scripts that write no spaces, each character."""

ROUNDING = 1e-9
"""0.7 * 10 is more than 7 in floats: without this a pair exactly at the threshold is missed."""

Shingle = tuple[str, ...]


def near_duplicates(
    held_out: Sequence[str], training: Sequence[str], threshold: float = 0.8, n: int = 5
) -> list[tuple[int, int, float]]:
    """Held-out texts with a training text whose shingles have Jaccard similarity >= threshold.

    A shingle is n words in a row, case and punctuation ignored (Broder, "On the resemblance and
    containment of documents", 1997); a text of fewer than n words is one shingle. The result is
    exact, not sampled: two sets this similar share one of their few rarest elements, so an inverted
    index over those finds every pair (prefix filtering; Chaudhuri, Ganti & Kaushik, ICDE 2006).

    Returns:
        (held-out position, position of its most similar training text, similarity), in held-out
        order; a text without words is never a duplicate, and of equally similar ones the first
        counts.
    Raises:
        ValueError: `threshold` is outside (0, 1] or `n` below 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}.")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    index = _PrefixIndex([shingles(text, n) for text in training], threshold)
    found = ((i, index.nearest(shingles(text, n))) for i, text in enumerate(held_out))
    return [(i, *match) for i, match in found if match is not None]


def shingles(text: str, n: int = 5) -> frozenset[Shingle]:
    """Every run of n words; the whole text if it is shorter; none if it has no word."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if len(words) < n:
        return frozenset([tuple(words)] if words else [])
    return frozenset(zip(*(words[i:] for i in range(n)), strict=False))


class _PrefixIndex:
    """Sets by their rarest elements.

    With elements in a common order, |x & y| >= s implies that the first |x| - s + 1 of x and the
    first |y| - s + 1 of y have an element in common; J >= t implies s >= ceil(t |x|) and
    t |x| <= |y| <= |x| / t.
    """

    def __init__(self, sets: Sequence[frozenset[Shingle]], threshold: float):
        self.threshold = threshold
        frequency = Counter(shingle for members in sets for shingle in members)
        rarest_first = sorted(frequency, key=frequency.__getitem__)
        self.rank = {shingle: rank for rank, shingle in enumerate(rarest_first)}
        self.sets: dict[frozenset[int], int] = {}  # to its first place: copies are kept once
        self.holders: dict[int, list[frozenset[int]]] = defaultdict(list)
        for i, shingles_of in enumerate(sets):
            members = frozenset(self.rank[shingle] for shingle in shingles_of)
            if members and members not in self.sets:
                self.sets[members] = i
                for rank in sorted(members)[: self._prefix_length(len(members))]:
                    self.holders[rank].append(members)

    def nearest(self, shingles_of: frozenset[Shingle]) -> tuple[int, float] | None:
        """Place and similarity of the most similar set at or above the threshold."""
        size = len(shingles_of)
        members = frozenset(self.rank[s] for s in shingles_of if s in self.rank)
        unknown = size - len(members)  # the rarest of all, and held by no set
        prefix = sorted(members)[: max(0, self._prefix_length(size) - unknown)]
        best: tuple[float, int] | None = None
        for candidate in {c for rank in prefix for c in self.holders.get(rank, ())}:
            if min(size, len(candidate)) < self.threshold * max(size, len(candidate)) - ROUNDING:
                continue
            shared = len(members & candidate)
            similarity = shared / (size + len(candidate) - shared)
            found = (similarity, -self.sets[candidate])
            if similarity >= self.threshold and (best is None or found > best):
                best = found
        return None if best is None else (-best[1], best[0])

    def _prefix_length(self, size: int) -> int:
        return size - ceil(self.threshold * size - ROUNDING) + 1
