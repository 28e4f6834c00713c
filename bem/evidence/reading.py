"""What the tiny reranker reads of a text: its words, and of a long text the part that matters.

A word enters as its pieces (the base's byte-level BPE), its stem decides what matches, and its
rarity comes from a table of document frequencies that ships with the weights.
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

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")
TITLE = re.compile(r"^[^:\n]{1,80}:\s")


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
    unique = list({word.stem: word for word in query}.values())
    covered = window_rarity(matches(unique, found), words.rarity(unique), size)
    best = covered.max(initial=0.0)
    # the middle of equally good windows: context on both sides of the match
    places = np.flatnonzero(covered >= best - 1e-6)
    return int(places[len(places) // 2]) if best > 0 else 0


def matches(query: Sequence[Word], found: Sequence[Word]) -> NDArray[np.bool_]:
    """[query, found] whether the words have the same stem."""
    asked = np.array([word.stem for word in query], dtype=np.int64)
    here = np.array([word.stem for word in found], dtype=np.int64)
    return asked[:, None] == here[None]


def window_rarity(
    same: NDArray[np.bool_], weight: NDArray[np.float32], size: int
) -> NDArray[np.float32]:
    """[windows] summed weight of the query words that occur in each window of `size` words.

    Args:
        same: [query, words] from `matches`.
        weight: [query], 0 for the repeats of a word.
    """
    n = same.shape[1]
    size = min(size, n)
    counts = np.zeros((len(same), n + 1), dtype=np.int32)
    np.cumsum(same, axis=1, out=counts[:, 1:])
    return weight @ (counts[:, size:] > counts[:, : n + 1 - size]).astype(np.float32)
