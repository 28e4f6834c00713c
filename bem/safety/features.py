"""Hashed tf-idf of words and characters: what the linear classifiers read.

    words        one word, and two in a row
    characters   3 to 5 in a row inside a word, its ends marked

Each is counted in 2^16 buckets (crc32), as (1 + log count) * idf, and both halves have length one (as
scikit-learn's TfidfVectorizer with sublinear_tf and norm l2).
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

BUCKETS = 1 << 16
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
SIZES = (3, 4, 5)
LONGEST_WORD = 32
"""Of a longer run of letters only the beginning is read by characters: no word is so long."""


def buckets(text: str) -> tuple[Counter[int], Counter[int]]:
    """(words, characters): bucket -> how often, of a folded text; characters lie behind the words."""
    words = WORD.findall(text)
    pairs = (f"{a} {b}" for a, b in pairwise(words))
    of_words = Counter(crc32(w.encode()) % BUCKETS for w in (*words, *pairs))
    of_characters: Counter[int] = Counter()
    for word in words:
        marked = f" {word[:LONGEST_WORD]} ".encode()
        of_characters.update(
            BUCKETS + crc32(marked[i : i + n]) % BUCKETS
            for n in SIZES
            for i in range(len(marked) - n + 1)
        )
    return of_words, of_characters


def tf_idf(text: str, idf: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Indices and values of a folded text's features.

    Args:
        idf: (2 * BUCKETS,).
    """
    indices, values = [], []
    for counts in buckets(text):
        index = np.fromiter(counts, dtype=np.int64, count=len(counts))
        count = np.fromiter(counts.values(), dtype=np.float32, count=len(counts))
        value = (1 + np.log(count)) * idf[index]
        length = float(np.sqrt(np.dot(value, value)))
        indices.append(index)
        values.append(value / length if length > 0 else value)
    return np.concatenate(indices), np.concatenate(values)
