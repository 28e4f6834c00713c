"""A query and its passages as arrays: words, where they match, how rare they are.

The pieces of a pair cost no more than its words, and "this word of the passage is that word of the
query" is an input instead of something a small model would have to discover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bem.errors import DataError
from bem.evidence import bm25
from bem.evidence.reading import (
    BUCKETS,
    MAX_PASSAGE,
    MAX_PIECES,
    MAX_QUERY,
    Read,
    Word,
    Words,
    matches,
    window_rarity,
)

WORD_FEATURES = 6
PAIR_FEATURES = 12

NEAR = np.bartlett(17)[1:-1].astype(np.float32)  # triangle over 7 words to either side


@dataclass(frozen=True)
class Pairs:
    """One query with n passages, padded to the longest pair (length s)."""

    pieces: NDArray[np.int64]
    """[u, MAX_PIECES] BPE ids of the distinct words, 0 = none."""
    words: NDArray[np.int64]
    """[n, s] rows of `pieces`; 0 is the empty word (start, padding)."""
    segments: NDArray[np.int64]
    """[n, s] 0 padding, 1 start, 2 query, 3 passage."""
    positions: NDArray[np.int64]
    """[n, s] place within the segment."""
    codes: NDArray[np.int64]
    """[n, s] 1 + place in the query of the word that this one is or matches; 0 none."""
    features: NDArray[np.float32]
    """[n, s, WORD_FEATURES] matched, rarity, their product, number, capital, matches nearby."""
    summary: NDArray[np.float32]
    """[n, PAIR_FEATURES] see `_summary`."""
    first: int
    """Column at which the passages begin."""


def make_pairs(
    words: Words, query: Sequence[Word], passages: Sequence[Read], lexical: NDArray[np.float32]
) -> Pairs:
    """The model's input for one query and its passages.

    Args:
        lexical: [n] BM25 score of each passage, as `Bm25.scores` gives it.
    """
    first = 1 + len(query)
    shape = (len(passages), first + max((len(p.words) for p in passages), default=0))
    ids, segments, positions, codes = (np.zeros(shape, dtype=np.int64) for _ in range(4))
    features = np.zeros((*shape, WORD_FEATURES), dtype=np.float32)
    summary = np.zeros((shape[0], PAIR_FEATURES), dtype=np.float32)
    rows: dict[tuple[int, ...], int] = {(): 0}
    total = float(words.rarity(query).sum())
    segments[:, 0] = 1
    for i, passage in enumerate(passages):
        same = matches(query, passage.words)
        for segment, start, found, at_query in (
            (2, 1, query, matches(query, query)),
            (3, first, passage.words, same),
        ):
            here = i, slice(start, start + len(found))
            matched = same.sum(axis=1 if segment == 2 else 0) > 0
            ids[here] = [rows.setdefault(word.pieces, len(rows)) for word in found]
            segments[here] = segment
            positions[here] = np.arange(len(found))
            codes[here] = _first_match(at_query)
            features[here] = _features(words, found, matched, total)
        summary[i] = _summary(words, query, passage, same, float(lexical[i]))
    return Pairs(_padded(list(rows)), ids, segments, positions, codes, features, summary, first)


def _first_match(same: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[found] 1 + place of the first query word that matches; 0 none."""
    if not same.size:
        return np.zeros(same.shape[1], dtype=np.int64)
    return np.where(same.sum(axis=0) > 0, 1 + same.argmax(axis=0), 0)


def _padded(pieces: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
    table = np.zeros((len(pieces), MAX_PIECES), dtype=np.int64)
    for row, ids in enumerate(pieces):
        table[row, : len(ids)] = ids
    return table


def _features(
    words: Words, found: Sequence[Word], matched: NDArray[np.bool_], total: float
) -> NDArray[np.float32]:
    """[found, WORD_FEATURES]; `total`: summed rarity of the query."""
    rarity = words.rarity(found)
    weight = matched * rarity
    near = np.convolve(weight, NEAR)[7 : 7 + len(weight)] if len(weight) else weight
    number = np.array([w.number for w in found], dtype=np.float32)
    capital = np.array([w.capital for w in found], dtype=np.float32)
    columns = (matched, rarity / 10, weight / 10, number, capital, near / max(total, 1e-6))
    return np.stack(columns, axis=1).astype(np.float32)


def _summary(
    words: Words,
    query: Sequence[Word],
    passage: Read,
    same: NDArray[np.bool_],
    lexical: float,
) -> NDArray[np.float32]:
    """BM25 (raw, and per query rarity), coverage (whole, in 8, in 24 words, in the head), word
    pairs kept adjacent, share of the head that the query names, lengths."""
    rarity = words.rarity(query)
    stems = [word.stem for word in query]
    weight = rarity * np.array([stems.index(stem) == i for i, stem in enumerate(stems)], dtype=bool)
    total = max(float(weight.sum()), 1e-6)
    covered = same.any(axis=1) @ weight
    head = same[:, : passage.head]
    windows = [window_rarity(same, weight, k).max(initial=0.0) for k in (8, 24)]
    both = np.minimum(rarity[:-1], rarity[1:])
    next_to = same[1:] & (np.pad(same[:-1], ((0, 0), (1, 0)))[:, :-1])
    named = words.rarity(passage.words[: passage.head])
    return np.array(
        [
            lexical / 10,
            lexical / total,
            covered / total,
            windows[0] / total,
            windows[1] / total,
            (head.any(axis=1) @ weight) / total,
            (head.any(axis=0) @ named) / max(float(named.sum()), 1e-6),
            (next_to.any(axis=1) @ both) / max(float(both.sum()), 1e-6),
            np.log1p(passage.length) / 6,
            len(passage.words) / MAX_PASSAGE,
            total / 40,
            len(query) / MAX_QUERY,
        ],
        dtype=np.float32,
    )


def table_bm25(
    words: Words, query: Sequence[Word], passages: Sequence[Read]
) -> NDArray[np.float32]:
    """BM25 with the shipped document frequencies, for passages that come without an index.

    The formula of `bm25`, with a mean length of 100 words. Frequencies in a handful of passages
    would say nothing about rarity; those in the training texts do.
    """
    content = [w.stem for w in query if not w.function] or [w.stem for w in query]
    stems = sorted(set(content))
    scores = np.zeros(len(passages), dtype=np.float32)
    idf = words.idf[np.array(stems, dtype=np.int64) % BUCKETS]
    for i, passage in enumerate(passages):
        here = np.array([w.stem for w in passage.words], dtype=np.int64)
        tf = (here[None] == np.array(stems, dtype=np.int64)[:, None]).sum(1)
        scores[i] = idf @ (tf / (tf + bm25.K1 * (1 - bm25.B + bm25.B * len(here) / 100)))
    return scores


def checked_lexical(lexical: Sequence[float] | None, n: int) -> NDArray[np.float32] | None:
    """BM25 scores as an array, if they are given and fit n passages; else DataError."""
    if lexical is None:
        return None
    scores = np.asarray(lexical, dtype=np.float32)
    if scores.shape != (n,) or not np.isfinite(scores).all():
        raise DataError(
            f"lexical has shape {scores.shape} and {int((~np.isfinite(scores)).sum())} values that "
            f"are NaN or inf, for {n} passages: give the BM25 score of each, or None."
        )
    return scores
