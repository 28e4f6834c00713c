"""BM25: which passages share rare words with a query.

    score(q, d) = sum over terms t of q:  idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|))
    idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5))

(Robertson & Zaragoza, "The Probabilistic Relevance Framework", 2009; the idf of Lucene, which is never
negative.) The scores of every term in every passage are computed once by `bm25s` (Lù 2024,
arXiv:2407.03618) and stored as one sparse column per term, which is memory-mapped.

Terms are words of any script, NFKC-normalised, casefolded and stemmed (Snowball, English); scripts
that write no spaces (Chinese, Japanese, Thai ...) give overlapping pairs of characters. English function words
are indexed, but a query uses them only if it has nothing else.
"""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import Stemmer
from numpy.typing import NDArray

from bem.evidence.without_jax import bm25s

K1, B = 0.9, 0.4  # for passages of a paragraph (Trotman et al., "Improvements to BM25", 2014)

_FUNCTION_WORDS = """
a about after all also am an and any are as at be because been before being between both but by can
could did do does doing done for from had has have having he her hers him his how i if in into is it
its itself just me more most my no nor not of off on once only or other our ours out over own s same
she should so some such t than that the their them then there these they this those through to too
under until up very was we were what when where which while who whom whose why will with would you
your yours
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())

# Scripts without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]+"
)
_ASCII_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Words in reading order, normalised but not stemmed."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    text = text.casefold()
    if text.isascii():
        return _ASCII_WORD.findall(text)
    found: list[str] = []
    for word in _any_word().findall(text.replace("_", " ")):
        if word.isascii() or not _SPACELESS.search(word):
            found.append(word)
        else:
            found.extend(_split_spaceless(word))
    return found


def tokens(text: str) -> list[str]:
    """Terms that a query of this text searches for, in order, repeats kept.

    Function words are left out, unless there is nothing else ("to be or not to be").
    """
    found = words(text)
    return stem([word for word in found if word not in FUNCTION_WORDS] or found)


def stem(found: list[str]) -> list[str]:
    """Snowball's English stem of each word."""
    # Made anew (half a microsecond): one stemmer must not be used by two threads.
    return Stemmer.Stemmer("english", 0).stemWords(found)


class Bm25:
    """Scores of every passage for a query; see the module's docstring."""

    def __init__(self, library: bm25s.BM25):
        self._library = library
        self._terms: dict[str, int] = library.vocab_dict
        self._columns = library.scores["indptr"]
        self.count: int = library.scores["num_docs"]

    @classmethod
    def build(cls, texts: Iterable[str], on_progress: Callable[[int], None] | None = None) -> Bm25:
        """Index texts; `on_progress` hears how many have been read."""
        vocabulary: dict[str, int] = {}
        rows: list[list[int]] = []
        seen: dict[str, int] = {}  # unstemmed word -> term
        for text in texts:
            found = words(text)
            if new := [word for word in dict.fromkeys(found) if word not in seen]:
                for word, term in zip(new, stem(new), strict=True):
                    seen[word] = vocabulary.setdefault(term, len(vocabulary))
            rows.append([seen[word] for word in found])
            if on_progress:
                on_progress(len(rows))
        if not vocabulary:  # no text holds a word: one term that no query can contain
            vocabulary[""], rows = 0, [[0] for _ in rows]
        library = bm25s.BM25(k1=K1, b=B, method="lucene")
        library.index((rows, vocabulary), create_empty_token=False, show_progress=False)
        return cls(library)

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads into an existing folder."""
        self._library.save(folder, show_progress=False)

    @classmethod
    def load(cls, folder: Path) -> Bm25:
        """Memory-map what `save` wrote."""
        return cls(bm25s.BM25.load(folder, mmap=True, show_progress=False))

    def scores(self, query: str) -> NDArray[np.float32]:
        """BM25 score of every passage; 0 where no term is shared."""
        found = [self._terms[term] for term in tokens(query) if term in self._terms]
        if not found:
            return np.zeros(self.count, np.float32)
        return self._library.get_scores_from_ids(found)

    def idf(self, term: str) -> float:
        """ln(1 + (N - df + 0.5) / (df + 0.5)) of a term as `tokens` gives it; df = 0 if unknown."""
        at = self._terms.get(term)
        df = 0 if at is None else int(self._columns[at + 1] - self._columns[at])
        return math.log(1 + (self.count - df + 0.5) / (df + 0.5))


def _split_spaceless(word: str) -> list[str]:
    parts: list[str] = []
    end = 0
    for run in _SPACELESS.finditer(word):
        parts += [word[end : run.start()], *_pairs(run.group())]
        end = run.end()
    return [part for part in [*parts, word[end:]] if part]


def _pairs(run: str) -> list[str]:
    return [run[i : i + 2] for i in range(len(run) - 1)] or [run]


@cache
def _any_word() -> re.Pattern[str]:
    """Runs of letters, digits and the marks that belong to them (vowel signs, accents).

    `re` knows no category "mark", so the class is spelled out from the Unicode tables once.
    """
    marks = "".join(
        chr(code)
        for code in range(0x300, min(0x20000, sys.maxunicode))
        if unicodedata.category(chr(code)).startswith("M")
    )
    return re.compile(f"\\w+(?:[{marks}]+\\w*)*")
