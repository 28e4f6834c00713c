"""Query and passage as the tiny reranker reads them: words, where they match, how rare they are.

A word enters as its pieces (the base's byte-level BPE), its stem decides what matches, and its
rarity comes from a table of document frequencies that ships with the weights. So the pieces of a
pair cost no more than its words, and "this word of the passage is that word of the query" is an
input instead of something a small model would have to discover.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bem.errors import DataError
from bem.evidence import bm25
from bem.evidence.windows import densest

MAX_QUERY = 24
"""Words of the query that are read."""
MAX_PASSAGE = 120
"""Words of the passage that are read: its head and the window that matches best."""
MAX_PIECES = 6
"""BPE pieces of a word that are read."""
BUCKETS = 1 << 15
"""Entries of the document-frequency table; a stem's entry is its CRC-32 modulo this."""
HEAD = 12
"""Words from the beginning of a long passage (its title) kept beside the window."""
LONG = 4000
"""Characters above which only the surroundings of matches are split into words."""

WORD_FEATURES = 6
PAIR_FEATURES = 12

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")
TITLE = re.compile(r"^[^:\n]{1,80}:\s")
NEAR = np.bartlett(17)[1:-1].astype(np.float32)  # triangle over 7 words to either side


@dataclass(frozen=True, slots=True)
class Word:
    """What is known of a word by itself."""

    text: str
    """Casefolded."""
    pieces: tuple[int, ...]
    stem: int
    """CRC-32 of the stem: equal for words that match."""
    number: bool
    capital: bool
    function: bool
    """An English function word: no query is searched for it."""


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


class Words:
    """Text -> `Word`s with the tokenizer of the base and the English Snowball stemmer."""

    def __init__(self, tokenizer: Any, idf: NDArray[np.float32]):
        """
        Args:
            tokenizer: a `tokenizers.Tokenizer`.
            idf: [BUCKETS] rarity per hashed stem, ln(1 + (N - df + 1/2) / (df + 1/2)).
        """
        self.tokenizer = tokenizer
        self.idf = idf
        self.word = lru_cache(maxsize=200_000)(self._word)

    def _word(self, text: str) -> Word:
        ids = tuple(self.tokenizer.encode(f" {text[:40]}", add_special_tokens=False).ids)
        plain = text[:40].casefold()
        stem = zlib.crc32(bm25.stem([plain])[0].encode())
        function = plain in bm25.FUNCTION_WORDS
        return Word(plain, ids[:MAX_PIECES], stem, text[0].isdigit(), text[0].isupper(), function)

    def split(self, text: str) -> list[Word]:
        """The words of a text, in order (NFKC; letters and digits of any script)."""
        return [self.word(found) for found in WORD.findall(unicodedata.normalize("NFKC", text))]

    def rarity(self, words: Sequence[Word]) -> NDArray[np.float32]:
        """[words] idf of each word."""
        return self.idf[np.array([word.stem % BUCKETS for word in words], dtype=np.int64)]


@dataclass(frozen=True)
class Read:
    """A passage cut to the words that are read."""

    words: list[Word]
    length: int
    """Words of the whole passage (estimated from its characters when it is very long)."""
    head: int
    """Words of the title, or of the beginning if it has none."""


def query_words(words: Words, query: str) -> list[Word]:
    return words.split(query[: 40 * MAX_QUERY])[:MAX_QUERY]


def read_passage(words: Words, query: Sequence[Word], text: str) -> Read:
    """The head of a passage and the window of it that holds most of the query.

    A passage of up to MAX_PASSAGE words is read whole. One of more than LONG characters is first
    cut to the LONG characters around the densest run of query words.
    """
    title = TITLE.match(text[:100])
    length = len(text) // 6
    if len(text) > LONG:
        weights = {w.text: float(r) for w, r in zip(query, words.rarity(query), strict=True)}
        start = densest(weights, text, LONG)
        beginning = "" if start == 0 else text[:200].rsplit(" ", 1)[0]
        found = words.split(f"{beginning} {text[start : start + LONG]}")
    else:
        found = words.split(text)
        length = len(found)
    head = min(HEAD, len(words.split(title.group())) if title else HEAD)
    if len(found) > MAX_PASSAGE:
        start = _best_window(words, query, found, MAX_PASSAGE - HEAD)
        found = found[:HEAD] + found[max(start, HEAD) : max(start, HEAD) + MAX_PASSAGE - HEAD]
    return Read(found, length, head)


def _best_window(words: Words, query: Sequence[Word], found: Sequence[Word], size: int) -> int:
    """First word of the window of `size` words whose distinct query words are rarest in sum."""
    covered = _window_rarity(words, query, found, size)
    best = covered.max(initial=0.0)
    # the middle of equally good windows: context on both sides of the match
    places = np.flatnonzero(covered >= best - 1e-6)
    return int(places[len(places) // 2]) if best > 0 else 0


def _window_rarity(
    words: Words, query: Sequence[Word], found: Sequence[Word], size: int
) -> NDArray[np.float32]:
    """[windows] summed idf of the distinct query words in each window of `size` words."""
    stems = np.array(sorted({word.stem for word in query}), dtype=np.int64)
    here = np.array([word.stem for word in found], dtype=np.int64)
    hits = np.cumsum(np.pad(here[None] == stems[:, None], ((0, 0), (1, 0))), axis=1)
    size = min(size, len(found))
    inside = (hits[:, size:] - hits[:, :-size]) > 0 if size else hits > 0
    return words.idf[stems % BUCKETS] @ inside.astype(np.float32)


def make_pairs(
    words: Words, query: Sequence[Word], passages: Sequence[Read], lexical: NDArray[np.float32]
) -> Pairs:
    """The model's input for one query and its passages.

    Args:
        lexical: [n] BM25 score of each passage, as `Bm25.scores` gives it.
    """
    n, s = len(passages), 1 + len(query) + max((len(p.words) for p in passages), default=0)
    rows: dict[tuple[int, ...], int] = {(): 0}
    index = lambda found: [rows.setdefault(w.pieces, len(rows)) for w in found]  # noqa: E731
    out_words, segments, positions, codes = (np.zeros((n, s), dtype=np.int64) for _ in range(4))
    features = np.zeros((n, s, WORD_FEATURES), dtype=np.float32)
    summary = np.zeros((n, PAIR_FEATURES), dtype=np.float32)
    stems = np.array([w.stem for w in query], dtype=np.int64)
    rarity = words.rarity(query)
    first = 1 + len(query)
    segments[:, 0] = 1
    segments[:, 1:first] = 2
    positions[:, 1:first] = np.arange(len(query))
    out_words[:, 1:first] = index(query)
    codes[:, 1:first] = 1 + np.array([stems.tolist().index(x) for x in stems], dtype=np.int64)
    for i, passage in enumerate(passages):
        end = first + len(passage.words)
        here = np.array([w.stem for w in passage.words], dtype=np.int64)
        same = here[None] == stems[:, None]
        out_words[i, first:end] = index(passage.words)
        segments[i, first:end] = 3
        positions[i, first:end] = np.arange(len(passage.words))
        if same.size:
            codes[i, first:end] = np.where(same.any(0), 1 + same.argmax(0), 0)
        features[i, 1:first] = _features(query, same.any(1), rarity, rarity.sum())
        features[i, first:end] = _features(
            passage.words, same.any(0), words.rarity(passage.words), rarity.sum()
        )
        summary[i] = _summary(words, query, passage, same, rarity, float(lexical[i]))
    pieces = np.zeros((len(rows), MAX_PIECES), dtype=np.int64)
    for ids, row in rows.items():
        pieces[row, : len(ids)] = ids
    return Pairs(pieces, out_words, segments, positions, codes, features, summary, first)


def _features(
    found: Sequence[Word], matched: NDArray[np.bool_], rarity: NDArray[np.float32], total: float
) -> NDArray[np.float32]:
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
    rarity: NDArray[np.float32],
    lexical: float,
) -> NDArray[np.float32]:
    """BM25 (raw, and per query rarity), coverage (whole, in 8, in 24 words, in the head), word
    pairs kept adjacent, share of the head that the query names, lengths."""
    unique = np.array([w.stem not in {v.stem for v in query[:i]} for i, w in enumerate(query)])
    weight = rarity * unique if len(query) else rarity
    total = max(float(weight.sum()), 1e-6)
    covered = same.any(1) @ weight
    head = same[:, : passage.head]
    windows = [
        _window_rarity(words, query, passage.words, k).max(initial=0.0) if query else 0.0
        for k in (8, 24)
    ]
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
            (head.any(1) @ weight) / total,
            (head.any(0) @ named) / max(float(named.sum()), 1e-6),
            (next_to.any(1) @ both) / max(float(both.sum()), 1e-6),
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
