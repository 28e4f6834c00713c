"""From a question to the passages in its prompt and the record of how good they are.

retriever = Retriever(open_index("index"), load_reranker("tiny"), timeout_ms=6)
evidence = retriever.retrieve("who got the first nobel prize in physics")
evidence.passages, evidence.record.features()
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from bem.errors import DataError
from bem.evidence import bm25
from bem.evidence.coverage import Idf, Tokens
from bem.evidence.record import EvidenceRecord, make_record, unranked_record

if TYPE_CHECKING:
    from bem.evidence.index import Hit, Method
    from bem.evidence.passages import Passage
    from bem.evidence.rerank import Reranker

SEARCH_BLOCK = 64
"""Questions searched at once: enough for an encoder to batch, few enough to show progress."""


class Searchable(Protocol):
    """What a retriever asks of an index: `Index` and `SwappedIndex` have it."""

    def search(
        self, queries: Sequence[str], k: int = 10, method: Method = "bm25"
    ) -> list[list[Hit]]: ...

    def tokens(self, text: str) -> list[str]: ...

    def idf(self, term: str) -> float: ...


@dataclass(frozen=True)
class Evidence:
    """What is shown for one question, and what is known about it."""

    passages: tuple[Passage, ...]
    """Best first."""
    record: EvidenceRecord


class Retriever:
    """Searches, reranks, and keeps the best passages, within a time budget.

    Past `timeout_ms` (search and reranking together) the answer starts without the reranker: the
    passages stand in the order of the search, and the record says so and has no features.

    Args:
        index: where `retrieve` searches and what `rank` weighs words by; None: `rank` only.
        reranker: judges the candidates; None: the order of the search, and no features.
        method: of the search.
        candidates: passages that the search hands to the reranker.
        shown: passages that go into the prompt, at most.
        timeout_ms: time from the question to its evidence; None: no limit.
        temperature: T of the record's entropy.
    """

    def __init__(
        self,
        index: Searchable | None = None,
        reranker: Reranker | None = None,
        method: Method = "bm25",
        candidates: int = 20,
        shown: int = 3,
        timeout_ms: float | None = None,
        temperature: float = 1.0,
    ):
        if not 1 <= shown <= candidates:
            raise ValueError(
                f"shown must lie between 1 and candidates ({candidates}), got {shown}."
            )
        if timeout_ms is not None and not timeout_ms > 0:
            raise ValueError(f"timeout_ms must be > 0, got {timeout_ms}. For no limit give None.")
        self.index, self.reranker = index, reranker
        self.method: Method = method
        self.candidates, self.shown = candidates, shown
        self.timeout_ms, self.temperature = timeout_ms, temperature

    def retrieve(self, query: str) -> Evidence:
        """The best passages of the index for one question."""
        return self.retrieve_many([query])[0]

    def retrieve_many(
        self, queries: Sequence[str], on_progress: Callable[[int, int], None] | None = None
    ) -> list[Evidence]:
        """Evidence for each question; each has the time budget to itself.

        Args:
            on_progress: hears (questions done, all questions).
        Raises:
            DataError: there is no index, or the reranker gave NaN.
        """
        if isinstance(queries, str):
            raise DataError("retrieve_many takes a list of questions; got one string.")
        if self.index is None:
            raise DataError("This Retriever has no index; rank(query, passages) needs none.")
        found: list[Evidence] = []
        for query, hits, searched in self._searched(self.index, queries):
            passages = [hit.passage for hit in hits]
            lexical = [hit.lexical for hit in hits]
            found.append(
                self._judged(query, passages, lexical, self.index.tokens, self.index.idf, searched)
            )
            if on_progress:
                on_progress(len(found), len(queries))
        return found

    def rank(self, query: str, passages: Sequence[Passage]) -> Evidence:
        """The best of the passages that came with a question; all of them are candidates.

        Without a reranker they stay in the order given. Words are weighed by the index if there is
        one, else by how many of these passages have them.
        """
        started = monotonic()
        if self.index is not None:
            tokens, idf = self.index.tokens, self.index.idf
        else:
            tokens, idf = bm25.tokens, idf_among([p.shown for p in passages], bm25.tokens)
        return self._judged(query, passages, None, tokens, idf, monotonic() - started)

    def _searched(
        self, index: Searchable, queries: Sequence[str]
    ) -> Iterator[tuple[str, list[Hit], float]]:
        """Each question with its hits and its share of the seconds that the search took."""
        for start in range(0, len(queries), SEARCH_BLOCK):
            block, started = queries[start : start + SEARCH_BLOCK], monotonic()
            hits = index.search(block, self.candidates, self.method)
            share = (monotonic() - started) / len(block)
            for query, of_query in zip(block, hits, strict=True):
                yield query, of_query, share

    def _judged(
        self,
        query: str,
        candidates: Sequence[Passage],
        lexical: Sequence[float] | None,
        tokens: Tokens,
        idf: Idf,
        spent: float,
    ) -> Evidence:
        """Evidence from candidates in first-stage order, `spent` seconds after the question."""
        started = monotonic() - spent
        deadline = None if self.timeout_ms is None else started + self.timeout_ms / 1000
        logits = self._logits(query, candidates, lexical, deadline)
        if logits is None:
            first = tuple(candidates[: self.shown])
            late = self.reranker is not None and len(candidates) > 0
            record = unranked_record(
                query, first, timed_out=late, seconds=monotonic() - started
            )  # fmt: skip
            return Evidence(first, record)
        order = np.argsort(-logits, kind="stable")[: self.shown]
        shown = tuple(candidates[int(i)] for i in order)
        record = make_record(
            query, shown, logits, tokens=tokens, idf=idf, temperature=self.temperature
        )
        return Evidence(shown, replace(record, seconds=monotonic() - started))

    def _logits(
        self,
        query: str,
        candidates: Sequence[Passage],
        lexical: Sequence[float] | None,
        deadline: float | None,
    ) -> NDArray[np.float32] | None:
        """The reranker's logit of every candidate; None: no reranker, no candidate or no time."""
        if self.reranker is None or not candidates:
            return None
        if deadline is not None and monotonic() >= deadline:
            return None
        logits = self.reranker.logits(query, [p.shown for p in candidates], lexical, deadline)
        if logits is None:
            return None
        if logits.shape != (len(candidates),) or not np.isfinite(logits).all():
            raise DataError(
                f"Reranker {self.reranker.name} gave {logits.shape} logits for {len(candidates)} "
                f"passages, {int((~np.isfinite(logits)).sum())} of them NaN or inf: "
                "check its weights."
            )
        return logits


def idf_among(texts: Sequence[str], tokens: Tokens) -> Idf:
    """ln(1 + (N - df + 0.5) / (df + 0.5)), counted in these texts."""
    n = len(texts)
    df = Counter(term for text in texts for term in set(tokens(text)))
    return lambda term: math.log(1 + (n - df[term] + 0.5) / (df[term] + 0.5))
