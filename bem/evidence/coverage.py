"""How well passages cover a question, agree with one another, and contradict one another.

Agreement and contradiction weigh a passage by p_i, the probability that it supports the answer (sigmoid
of the reranker's logit). The source document names the same features; two of its formulas are repaired:

- Its coverage, sum_i softmax(s)_i exp(-0.1 i) cos(q, d_i), discounts by rank and takes a cosine of
  a short question with a long passage: a perfect passage scores far below 1. Ours asks of each
  term of the question whether a passage has it, and reaches 1. It does not weigh by relevance:
  `best` and `margin` say that already.
- Its consistency leaves out the pairs (i, i): one strong passage with weak ones beside it counts
  as inconsistent, a single passage as undefined. With them it is 1 - Rao's quadratic entropy.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from math import log, sqrt

Tokens = Callable[[str], Sequence[str]]
"""Text to its terms, in order, as the index makes them."""
Idf = Callable[[str], float]
"""Term to its weight, >= 0: how rare it is in the corpus."""

READ_CHARACTERS = 20_000
"""A passage is read up to here: more never reaches a prompt, and reading takes time."""
READ_SENTENCES = 20
"""Sentences of a passage that are compared with other passages: those closest to the question."""
SAME_TOPIC = 0.75
"""Share (by idf) of the shorter sentence's content that the other must have to be compared."""
MIN_SHARED = 2
"""Content terms that two sentences must share at least."""

NEGATIONS = frozenset([
    "no", "not", "never", "none", "nobody", "nothing", "nowhere", "neither", "nor", "without",
    "cannot",
])  # fmt: skip
NUMBER_WORDS = {"zero": 0.0, "two": 2.0, "three": 3.0, "four": 4.0, "five": 5.0, "six": 6.0,
    "seven": 7.0, "eight": 8.0, "nine": 9.0, "ten": 10.0, "eleven": 11.0, "twelve": 12.0,
}  # fmt: skip
"""Without `one`: it is a pronoun more often than a number."""
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*|\w+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+|(?<=[。！？])")


@dataclass(frozen=True)
class Sentence:
    """What a sentence says, as far as words tell. Negations and number words are English."""

    words: frozenset[str]
    """Lower-case, without numbers and negations."""
    numbers: frozenset[float]
    negated: bool
    """An odd number of negations."""
    tokens: Tokens = field(repr=False, compare=False)

    @cached_property
    def content(self) -> frozenset[str]:
        """Terms of the words. Made when asked for: few sentences are ever compared."""
        return frozenset(self.tokens(" ".join(sorted(self.words))))


@dataclass(frozen=True)
class Reading:
    """One passage as these measures see it."""

    counts: Mapping[str, int]
    """Term to its number of occurrences."""
    sentences: tuple[Sentence, ...]


def read(text: str, tokens: Tokens, query: str = "") -> Reading:
    """The terms of a passage, and the sentences that share most words with `query`.

    Args:
        text: read up to READ_CHARACTERS.
        tokens: text to terms, as the index makes them.
        query: the question; empty: the first sentences are taken.
    """
    text = text[:READ_CHARACTERS]
    asked = frozenset(_WORD.findall(query.lower()))
    said = [sentence(part, tokens) for part in _SENTENCE_END.split(text) if part.strip()]
    nearest = sorted(said, key=lambda s: -len(s.words & asked))[:READ_SENTENCES]
    return Reading(Counter(tokens(text)), tuple(nearest))


def sentence(text: str, tokens: Tokens) -> Sentence:
    """Words, numbers and polarity of one sentence."""
    words, numbers, negations = set(), set(), 0
    for word in _WORD.findall(text.lower().replace("’", "'")):
        if word in NEGATIONS or word.endswith("n't"):
            negations += 1
        elif (number := _number(word)) is not None:
            numbers.add(number)
        else:
            words.add(word)
    return Sentence(frozenset(words), frozenset(numbers), negations % 2 == 1, tokens)


def coverage(query_terms: Sequence[str], shown: Sequence[Reading], idf: Idf) -> float:
    """Share of the question that the passages speak of, in [0, 1].

        sum_t idf_t [t in any d_i] / sum_t idf_t        t: distinct terms of the question

    A rare term counts more. 0 without terms.
    """
    weights = {term: idf(term) for term in query_terms}
    total = sum(weights.values())
    if total <= 0:
        return 0.0
    said = (w for term, w in weights.items() if any(term in d.counts for d in shown))
    return sum(said) / total


def consistency(shown: Sequence[Reading], p: Sequence[float], idf: Idf) -> float:
    """How alike two passages are that are drawn with their weights, in (0, 1]; 0 without passages.

        sum_ij w_i w_j cos(d_i, d_j)        w = p / sum p,  d_i the tf-idf vector, (1 + ln tf) idf

    One minus Rao's quadratic entropy (Rao, "Diversity and dissimilarity coefficients", 1982) with
    the distance 1 - cos. Pairs (i, i) are in it: one passage with all the weight is consistent.
    """
    weights = _shares(p)
    vectors = [_unit({t: (1 + log(n)) * idf(t) for t, n in d.counts.items()}) for d in shown]
    total = sum(w * w for w in weights)
    for i, j in combinations(range(len(shown)), 2):
        total += 2 * weights[i] * weights[j] * _dot(vectors[i], vectors[j])
    return min(total, 1.0)


def contradiction(shown: Sequence[Reading], p: Sequence[float], idf: Idf) -> float:
    """Chance that two passages drawn with their weights contradict each other, in [0, 1 - 1/n].

        sum_{i != j} w_i w_j [d_i contradicts d_j]        w = p / sum p

    Two of the cues of de Marneffe, Rafferty & Manning ("Finding contradictions in text", ACL 2008):
    sentences about the same thing that differ in polarity, or in their numbers. Antonyms, facts
    about the world and structure are not looked at, and word overlap stands in for their alignment
    of parses: many contradictions are missed. It needs no model, and a change of it can be read off
    the two sentences.
    """
    weights = _shares(p)
    total = 0.0
    for i, j in combinations(range(len(shown)), 2):
        if contradict(shown[i], shown[j], idf):
            total += 2 * weights[i] * weights[j]
    return total


def contradict(a: Reading, b: Reading, idf: Idf) -> bool:
    """Some sentence of `a` is about the same thing as one of `b` and says otherwise."""
    return any(
        _conflict(x, y) and _same_topic(x.content, y.content, idf)
        for x in a.sentences
        for y in b.sentences
    )


def _conflict(x: Sentence, y: Sentence) -> bool:
    """Opposite polarity; or each has a number that the other lacks (if only one has, it is just
    more precise)."""
    return x.negated != y.negated or bool(x.numbers - y.numbers and y.numbers - x.numbers)


def _same_topic(x: frozenset[str], y: frozenset[str], idf: Idf) -> bool:
    shared = x & y
    if len(shared) < MIN_SHARED:
        return False
    smaller = min(sum(map(idf, x)), sum(map(idf, y)))
    return sum(map(idf, shared)) >= SAME_TOPIC * smaller


def _number(word: str) -> float | None:
    if word in NUMBER_WORDS:
        return NUMBER_WORDS[word]
    if not word[0].isdecimal():
        return None
    try:
        return float(word.replace(",", ""))
    except ValueError:  # 1.2.3 is a version, 5th an ordinal
        return None


def _shares(p: Sequence[float]) -> list[float]:
    """Weights that sum to 1; equal ones if every p is 0."""
    total = sum(p)
    return [p_i / total if total > 0 else 1 / len(p) for p_i in p]


def _unit(vector: Mapping[str, float]) -> Mapping[str, float]:
    norm = sqrt(sum(v * v for v in vector.values()))
    return {t: v / norm for t, v in vector.items()} if norm > 0 else {}


def _dot(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    a, b = (a, b) if len(a) <= len(b) else (b, a)
    return sum(v * b.get(t, 0.0) for t, v in a.items())
