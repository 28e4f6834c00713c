"""Questions with their right passages, and the pools from which wrong ones are mined.

Training sets come from `*.train` files, OpenStax prose and the training side of the standard
library; held-out sets from `*.dev` files and the dev side. A question's candidates are the top BM25
passages of its pool. Passages that hold the answer without being marked as right are left out of
training, so that "looks right, has no answer" is what the model learns to reject.
"""

import gzip
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bem.evidence.bm25 import FUNCTION_WORDS, Bm25, stem, words
from bem.tasks.functions import Function, Part, functions


@dataclass(frozen=True)
class Question:
    """A query, its right passages and what may not occur in a wrong one."""

    id: str
    query: str
    right: tuple[int, ...]
    """Rows of the set's pool."""
    answers: tuple[str, ...] = ()
    """Texts that make an unmarked passage ambiguous."""
    group: str = ""
    """Cluster of the statistics: article, title, module."""
    among: tuple[int, ...] = ()
    """Candidates that come with the question; empty: the whole pool."""


@dataclass
class PairSet:
    """Questions over one pool of passages."""

    name: str
    pool: list[str]
    questions: list[Question]
    lists: int = 0
    """Candidate lists drawn from this set per pass over the data; 0: one per question."""
    pool_name: str = ""
    rows: dict[str, int] = field(default_factory=dict, repr=False)

    def add(self, text: str) -> int:
        """Row of a passage, which enters the pool once."""
        if text not in self.rows:
            self.rows[text] = len(self.pool)
            self.pool.append(text)
        return self.rows[text]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


# ------------------------------------------------------------------------------------ training sets


def training_sets(data: Path, rng: random.Random) -> list[PairSet]:
    """All sets that the shipped model learns from."""
    return [
        _nq(data / "qa_nq_oracle.train.jsonl.gz", rng),
        _cloze(data / "lm_openstax.train.jsonl.gz", rng),
        _strategy(data / "qa_strategy.train.jsonl.gz"),
        _pubmed(data / "qa_pubmed.train.jsonl.gz"),
        _babi(data / "qa_babi.train.jsonl.gz", rng),
        _tldr(data / "cmd_tldr.train.jsonl.gz", rng),
        stdlib("train"),
    ]


def _nq(path: Path, rng: random.Random) -> PairSet:
    found = PairSet("nq", [], [], lists=5600)
    for row in read_rows(path):
        title = row["meta"]["title"]
        titled = rng.random() < 0.5  # half of the passages are seen as "title: text"
        texts = [row["evidence"][i] for i in row["gold_evidence"]]
        right = tuple(found.add(f"{title}: {text}" if titled else text) for text in texts)
        found.questions.append(
            Question(row["id"], row["input"], right, tuple(row["references"]), title)
        )
    return found


def _strategy(path: Path) -> PairSet:
    """The facts behind an implicit question; short passages, little overlap."""
    found = PairSet("strategy", [], [], lists=1100)
    for row in read_rows(path):
        right = tuple(found.add(row["evidence"][i]) for i in row["gold_evidence"])
        if right:
            found.questions.append(Question(row["id"], row["input"], right))
    return found


def _pubmed(path: Path) -> PairSet:
    found = PairSet("pubmed", [], [], lists=400)
    for row in read_rows(path):
        right = tuple(found.add(text) for text in row["evidence"])
        found.questions.append(Question(row["id"], row["input"], right))
    return found


def _babi(path: Path, rng: random.Random) -> PairSet:
    """Which sentence of a small story answers: everything else has the same words."""
    found = PairSet("babi", [], [], lists=500)
    rows = [r for r in read_rows(path) if 4 <= len(r["evidence"]) <= 25]
    for row in rng.sample(rows, 3000):
        among = tuple(found.add(text) for text in row["evidence"])
        right = tuple({among[i] for i in row["gold_evidence"]})
        found.questions.append(Question(row["id"], row["input"], right, among=among))
    return found


def _tldr(path: Path, rng: random.Random) -> PairSet:
    """What a command does -> the page of that command (its summary and two other uses)."""
    found = PairSet("tldr", [], [], lists=1800)
    pages: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(path):
        pages.setdefault(row["meta"]["command"], []).append(row)
    for command, rows in sorted(pages.items()):
        row, *others = rng.sample(rows, min(3, len(rows)))
        uses = [f"{other['input']}: {other['references'][0]}" for other in others]
        right = found.add("\n".join([*row["evidence"], *uses, row["references"][0]]))
        found.questions.append(Question(row["id"], row["input"], (right,), group=command))
    return found


def stdlib(part: Part) -> PairSet:
    """The first line of a docstring -> the function's source, which does not hold it."""
    found = PairSet(f"stdlib {part}", [], [], lists=2400)
    for function in functions()[part]:
        row = found.add(_source(function))
        if function.doc:
            asked = Question(function.id, function.doc, (row,), group=function.module)
            found.questions.append(asked)
    return found


def _source(function: Function) -> str:
    return "\n".join([function.header, *function.body])[:1500]


SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
YEAR = re.compile(r"\b(?:1[0-9]{3}|20[0-2][0-9])\b")
NUMBER = re.compile(r"\b\d[\d,.]*(?: (?:percent|million|billion|thousand))?")
NAME = re.compile(r"(?<=[a-z,] )(?:(?:[A-Z][\w'’.-]+) ?(?:of |the )?)+(?<! )")


def _cloze(path: Path, rng: random.Random) -> PairSet:
    """A sentence of a paragraph with its answer cut out and words dropped, asked as a question.

    (Cloze translation: Lewis et al. 2019, "Unsupervised Question Answering by Cloze Translation";
    without an answer it is an inverse cloze task: Lee et al. 2019.)
    """
    found = PairSet("openstax", [], [], lists=10500)
    documents = list(read_rows(path))
    for row in rng.sample(documents, min(len(documents), 2000)):
        title, *paragraphs = row["text"].split("\n")
        for i, paragraph in enumerate(paragraphs):
            if not 200 <= len(paragraph) <= 1500:
                continue
            titled = rng.random() < 0.4 and len(title) < 70
            at = found.add(f"{title}: {paragraph}" if titled else paragraph)
            asked = _cloze_question(paragraph, rng)
            if asked is not None:
                query, answer = asked
                answers = (answer,) if answer else ()
                found.questions.append(
                    Question(f"{row['id']}:{i}", query, (at,), answers, row["id"])
                )
    return found


def _cloze_question(paragraph: str, rng: random.Random) -> tuple[str, str] | None:
    sentences = [s for s in SENTENCE.split(paragraph) if 50 <= len(s) <= 260]
    if not sentences:
        return None
    sentence = rng.choice(sentences)
    ask, answer = _answer(sentence, rng)
    rest = sentence.replace(answer, " ", 1) if answer else sentence
    kept = [word for word in re.findall(r"[\w'’-]+", rest) if rng.random() < 0.4]
    if not 3 <= sum(word.lower() not in FUNCTION_WORDS for word in kept) <= 12:
        return None
    query = " ".join([*ask.split(), *kept])
    query = query.lower() if rng.random() < 0.5 else query
    return (f"{query}?" if ask and rng.random() < 0.5 else query), answer


def _answer(sentence: str, rng: random.Random) -> tuple[str, str]:
    """A question word and the span it asks for; two empty texts for a plain extract."""
    kinds: list[tuple[str, str]] = []
    for match in YEAR.finditer(sentence):
        kinds.append((rng.choice(["when", "what year", "in which year"]), match.group()))
    if not kinds:
        for match in NUMBER.finditer(sentence):
            kinds.append((rng.choice(["how many", "how much", "what number"]), match.group()))
    for match in NAME.finditer(sentence):
        before = sentence[: match.start()].rsplit(" ", 2)[-2:]
        if before[0] in ("in", "at", "near", "from"):
            asks = ["where", "in which place", "what"]
        elif " " in match.group():
            asks = ["who", "what", "who", "which"]
        else:
            asks = ["what", "which", "who"]
        kinds.append((rng.choice(asks), match.group()))
    return rng.choice(kinds) if kinds and rng.random() < 0.85 else ("", "")


# ----------------------------------------------------------------------------------- held-out sets


def held_out_sets(data: Path, side: Literal["choose", "report"]) -> list[PairSet]:
    """Four sets that nothing was trained on; the Wikipedia ones share one pool.

    Choices between trained models are made on one half of the clusters (a hash of the name), numbers
    are reported on the other.
    """
    pool = PairSet("wikipedia", [], [])
    for row in read_rows(data / "corpus_hotpot500.train.jsonl.gz"):
        pool.add(f"{row['input']}: {row['evidence'][0]}")
    found = []
    for name, cluster in (
        ("qa_nq_oracle", "title"),
        ("qa_hotpot500", None),
        ("qa_xquad_en", "article"),
    ):
        questions = []
        for row in read_rows(data / f"{name}.dev.jsonl.gz"):
            right = tuple(pool.add(row["evidence"][i]) for i in row["gold_evidence"])
            group = str(row["meta"][cluster]) if cluster else row["id"]
            asked = Question(row["id"], row["input"], right, tuple(row["references"]), group)
            questions.append(asked)
        found.append(PairSet(name, pool.pool, questions, pool_name="wikipedia"))
    found.append(stdlib("dev"))
    for pairs in found:
        pairs.questions = [q for q in pairs.questions if side_of(q.group) == side]
    return found


def side_of(group: str) -> str:
    return ("choose", "report")[int(hashlib.md5(group.encode()).hexdigest(), 16) % 2]


# ------------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class Candidates:
    """The passages that the first stage found for one question, best first."""

    question: Question
    rows: tuple[int, ...]
    lexical: tuple[float, ...]
    """BM25 scores as an index gives them."""

    def right(self) -> list[bool]:
        return [row in self.question.right for row in self.rows]


def first_stage(pairs: PairSet, k: int, with_right: bool = False) -> Iterator[Candidates]:
    """BM25's top k of the pool (or of the question's own passages) for each question.

    With `with_right` the right passages that BM25 missed follow at the end, with their scores.
    """
    engine = Bm25.build(pairs.pool)
    for question in pairs.questions:
        scores = engine.scores(question.query)
        among = np.array(question.among or range(len(scores)), dtype=np.int64)
        order = among[np.argsort(-scores[among], kind="stable")[:k]]
        order = np.array(list(dict.fromkeys(order.tolist())), dtype=np.int64)
        if not question.among:
            order = order[scores[order] > 0]
        if with_right:
            missed = [row for row in question.right if row not in order]
            order = np.concatenate([order, np.array(missed, dtype=np.int64)])
        yield Candidates(question, tuple(order.tolist()), tuple(scores[order].tolist()))


def wrong(pairs: PairSet, found: Candidates) -> list[int]:
    """Places in the list of candidates that are surely wrong: unmarked, and without the answer."""
    answers = [a.casefold() for a in found.question.answers if a]
    return [
        place
        for place, row in enumerate(found.rows)
        if row not in found.question.right
        and not any(answer in pairs.pool[row].casefold() for answer in answers)
    ]


def held_back(question: Question) -> bool:
    """A tenth of the training questions, by a hash of the group, for choosing and calibrating."""
    key = (question.group or question.id).encode()
    return int(hashlib.md5(key).hexdigest(), 16) % 10 == 0


def document_frequencies(
    texts: Iterable[str], buckets: int, key: Callable[[str], int]
) -> tuple[np.ndarray, int]:
    """[buckets] number of texts that hold a stem of the bucket, and the number of texts."""
    counts, n = np.zeros(buckets, dtype=np.int64), 0
    for text in texts:
        held = {key(term) for term in stem(words(text))}
        counts[list(held)] += 1
        n += 1
    return counts, n
