"""Worse evidence under the same names: does quality fall with it?

A model that reads its evidence does worse on a worse index: clean >= corrupt >= shuffled. To swap is to
search the clean index and to show what a worse corpus holds *under the id that was found*. Searching
the worse corpus itself would prove nothing: a search finds a text wherever it stands, so that a
corpus in another order gives the same passages as before.

    Retriever(swapped(index, shuffled(index.passages)), reranker)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bem.errors import DataError
from bem.evidence.bm25 import Bm25

if TYPE_CHECKING:
    from bem.evidence.index import Hit, Index, Method
    from bem.evidence.passages import Passage

_SENTENCE = re.compile(r".+?(?:[.!?]+(?=\s|$)|[。！？]|\n|$)\s*", re.DOTALL)


def corrupted(passages: Sequence[Passage], share: float = 0.5, seed: int = 0) -> list[Passage]:
    """Passages of which `share` of the sentences come from other passages.

    Sentence by sentence, because the text stays fluent: what falls is the evidence, not the
    language. Ids and titles stay. A passage of n sentences loses n * share of them, rounded at
    random so that the expectation holds: half of the passages of one sentence are replaced.

    Raises:
        DataError: fewer than two passages.
        ValueError: `share` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}.")
    _needs_two(passages)
    rng = np.random.default_rng(seed)
    split = [sentences(passage.text) for passage in passages]
    result = []
    for i, passage in enumerate(passages):
        parts = list(split[i])
        lost = math.floor(len(parts) * share + rng.random())
        for at in rng.permutation(len(parts))[:lost]:
            other = int(rng.integers(len(passages) - 1))
            donors = split[other + (other >= i)]  # any passage but this one
            end = parts[at][len(parts[at].rstrip()) :]
            parts[at] = donors[int(rng.integers(len(donors)))].rstrip() + end
        result.append(replace(passage, text="".join(parts)))
    return result


def shuffled(passages: Sequence[Passage], seed: int = 0) -> list[Passage]:
    """Every id holds the title and text of another passage; none keeps its own.

    One cycle through all passages in random order (Sattolo's permutations).

    Raises:
        DataError: fewer than two passages.
    """
    _needs_two(passages)
    order = np.random.default_rng(seed).permutation(len(passages))
    result = list(passages)
    for at, source in zip(order, np.roll(order, 1), strict=True):
        result[at] = replace(passages[source], id=passages[at].id)
    return result


def swapped(index: Index, passages: Sequence[Passage]) -> SwappedIndex:
    """Search `index`, but show what `passages` hold under the ids found.

    Raises:
        DataError: an id of the index has no passage.
    """
    return SwappedIndex(index, {passage.id: passage for passage in passages})


class SwappedIndex:
    """The order and scores of one index, the passages of another corpus."""

    def __init__(self, index: Index, shown: Mapping[str, Passage]):
        missing = [passage.id for passage in index.passages if passage.id not in shown]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(index.passages)} passages of the index have no "
                f"replacement (first: {missing[0]!r}). Corrupt or shuffle the index's own passages."
            )
        self._index, self._shown = index, shown
        self.passages = [shown[passage.id] for passage in index.passages]
        self._place = {passage.id: i for i, passage in enumerate(self.passages)}
        self._bm25 = Bm25.build(passage.shown for passage in self.passages)

    def search(
        self, queries: Sequence[str], k: int = 10, method: Method = "bm25"
    ) -> list[list[Hit]]:
        """Hits of the index with the other corpus' passages, each with the BM25 score of what it now
        says: the score of the clean text would tell a reranker what is no longer there."""
        return [
            self._worded(query, hits)
            for query, hits in zip(queries, self._index.search(queries, k, method), strict=True)
        ]

    def _worded(self, query: str, hits: list[Hit]) -> list[Hit]:
        lexical = self._bm25.scores(query)
        return [
            replace(
                hit,
                passage=self._shown[hit.passage.id],
                lexical=float(lexical[self._place[hit.passage.id]]),
            )
            for hit in hits
        ]

    def tokens(self, text: str) -> list[str]:
        """Terms of a text, as the index makes them."""
        return self._index.tokens(text)

    def idf(self, term: str) -> float:
        """Weight of a term in the clean corpus."""
        return self._index.idf(term)


def sentences(text: str) -> list[str]:
    """The text cut after each sentence, with its white space: joined they are the text."""
    return _SENTENCE.findall(text) or [text]


def _needs_two(passages: Sequence[Passage]) -> None:
    if len(passages) < 2:
        raise DataError(f"Evidence is swapped among passages; got {len(passages)}, need 2.")
