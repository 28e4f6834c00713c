"""Search over passages: BM25, dense, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bem.errors import DataError
from bem.evidence import bm25, fusion
from bem.evidence.bm25 import Bm25
from bem.evidence.passages import Passage, corpus_hash

Method = Literal["bm25", "dense", "hybrid"]


@dataclass(frozen=True)
class Hit:
    """One passage found."""

    passage: Passage
    score: float  # of the search method
    lexical: float  # BM25 score of the passage for the query; 0 if they share no word


class Index:
    """Passages that can be searched; made by `build`, `open_index` or `in_memory`."""

    def __init__(self, passages: Sequence[Passage], corpus_hash: str, lexical: Bm25):
        self.passages = passages
        self.corpus_hash = corpus_hash
        self._bm25 = lexical

    def search(
        self, queries: Sequence[str], k: int = 10, method: Method = "bm25"
    ) -> list[list[Hit]]:
        """The k best passages for each query, best first.

        Method bm25 finds only passages that share a word with the query, so possibly none.
        """
        if isinstance(queries, str):
            raise DataError("search takes a list of queries; got one string.")
        return [self._search(query, k) for query in queries]

    def tokens(self, text: str) -> list[str]:
        """Terms of a text as BM25 sees them, function words left out."""
        return bm25.tokens(text)

    def idf(self, term: str) -> float:
        """Inverse document frequency of a term, in nats."""
        return self._bm25.idf(term)

    def _search(self, query: str, k: int) -> list[Hit]:
        scores = self._bm25.scores(query)
        found = fusion.best(scores, k, above=0.0)
        return [Hit(self.passages[i], float(scores[i]), float(scores[i])) for i in found]


def in_memory(passages: Sequence[Passage]) -> Index:
    """Index a small corpus without a folder.

    Raises:
        DataError: there are no passages.
    """
    if not passages:
        raise DataError("There are no passages to index.")
    kept = unique(passages)
    return Index(kept, corpus_hash(passages), Bm25.build(p.shown for p in kept))


def unique(passages: Sequence[Passage]) -> list[Passage]:
    """The first passage of each text as shown; copies under other ids add nothing to a search."""
    first: dict[str, Passage] = {}
    for passage in passages:
        first.setdefault(passage.shown, passage)
    return list(first.values())
