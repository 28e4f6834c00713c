"""What is known about the evidence of one question before a word is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bem.config import EVIDENCE_FEATURES
from bem.errors import DataError
from bem.evidence.coverage import (
    Idf,
    Tokens,
    consistency,
    contradiction,
    coverage,
    read,
)

if TYPE_CHECKING:
    from bem.evidence.passages import Passage

FULL_COUNT = 10
"""Passages shown from which the feature `count` is 1."""


@dataclass(frozen=True)
class EvidenceRecord:
    """How good the evidence is, where it came from, and how long finding it took."""

    query: str
    scores: tuple[float, ...] = ()
    """Probability of every candidate that it supports the answer, best first; empty: no reranker
    ran."""
    best: float = 0.0
    margin: float = 0.0
    """Best score minus the median of all candidates' scores; 0 for one candidate."""
    entropy: float = 0.0
    """Of softmax(logits / T) over all candidates, in units of its maximum ln n; 0 for one."""
    contradiction: float = 0.0
    coverage: float = 0.0
    consistency: float = 0.0
    sources: tuple[str, ...] = ()
    """Ids of the passages shown, best first."""
    digest: str = ""
    """sha256 over ids and texts of the passages shown, in order: part of the cache key."""
    reranked: bool = False
    timed_out: bool = False
    """The time budget ran out before the reranker was done; passages stand in first-stage order."""
    seconds: float = field(default=0.0, compare=False)
    """Time from the question to this record."""

    def features(self) -> tuple[float, ...]:
        """What an adapter is told, in the order of `bem.config.EVIDENCE_FEATURES`, each in [0, 1].

        All zeros if nothing was found or no reranker ran: the adapter then falls back to its prior.
        """
        if not (self.reranked and self.sources):
            return (0.0,) * len(EVIDENCE_FEATURES)
        count = min(1.0, len(self.sources) / FULL_COUNT)
        return (
            1.0, self.best, self.margin, self.entropy, self.contradiction, self.coverage,
            self.consistency, count,
        )  # fmt: skip


def make_record(
    query: str,
    shown: Sequence[Passage],
    logits: ArrayLike,
    *,
    tokens: Tokens,
    idf: Idf,
    temperature: float = 1.0,
    seconds: float = 0.0,
) -> EvidenceRecord:
    """The record of a reranked question.

    Args:
        query: the question.
        shown: passages that go into the prompt, best first: those with the highest logits.
        logits: of all candidates, in any order; sigmoid(logit) is the probability that a candidate
            supports the answer.
        tokens: text to terms, as the index makes them.
        idf: weight of a term, >= 0.
        temperature: T of the entropy's softmax; > 0.
        seconds: time that finding and reranking took.
    Raises:
        DataError: a logit is NaN or inf, or more passages are shown than have one.
        ValueError: `temperature` is not positive.
    """
    ordered = _ordered(query, shown, logits, temperature)
    if not shown:
        return EvidenceRecord(query, digest=digest_of(()), seconds=seconds)
    scores = 0.5 * (1 + np.tanh(ordered / 2))  # sigmoid, without overflow
    idf = cache(idf)  # three measures ask for the same terms
    readings = [read(passage.shown, tokens, query) for passage in shown]
    p = [float(s) for s in scores[: len(shown)]]
    return EvidenceRecord(
        query=query,
        scores=tuple(map(float, scores)),
        best=p[0],
        margin=float(scores[0] - np.median(scores)),
        entropy=entropy_of(ordered / temperature),
        contradiction=contradiction(readings, p, idf),
        coverage=coverage(tokens(query), readings, idf),
        consistency=consistency(readings, p, idf),
        sources=tuple(passage.id for passage in shown),
        digest=digest_of(shown),
        reranked=True,
        seconds=seconds,
    )


def _ordered(
    query: str, shown: Sequence[Passage], logits: ArrayLike, temperature: float
) -> NDArray[np.float64]:
    """The logits, largest first; see `make_record`."""
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    ordered = np.sort(np.asarray(logits, dtype=np.float64))[::-1]
    if not np.isfinite(ordered).all():
        bad = ordered[~np.isfinite(ordered)][0]
        raise DataError(f"A reranker's logit is {bad} for {query!r:.80}: check its weights.")
    if len(shown) > ordered.size:
        raise DataError(f"{len(shown)} passages are shown, but only {ordered.size} have a logit.")
    return ordered


def unranked_record(
    query: str, shown: Sequence[Passage], *, timed_out: bool = False, seconds: float = 0.0
) -> EvidenceRecord:
    """The record of a question whose passages no reranker has seen: sources, but no features."""
    return EvidenceRecord(
        query=query,
        sources=tuple(passage.id for passage in shown),
        digest=digest_of(shown),
        timed_out=timed_out,
        seconds=seconds,
    )


def digest_of(shown: Sequence[Passage]) -> str:
    """sha256 over ids and texts, in order. Lengths go in too: ("ab", "c") is not ("a", "bc")."""
    state = sha256()
    for passage in shown:
        for part in (passage.id, passage.shown):
            data = part.encode("utf-8", "surrogatepass")
            state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()


def entropy_of(logits: NDArray[np.float64]) -> float:
    """Entropy of softmax(logits), divided by ln n: 0 one candidate stands out, 1 all are alike."""
    if logits.size < 2:
        return 0.0
    shifted = logits - logits.max()
    log_p = shifted - np.log(np.exp(shifted).sum())
    entropy = -float((np.exp(log_p) * log_p).sum()) / float(np.log(logits.size))
    return min(max(entropy, 0.0), 1.0)
