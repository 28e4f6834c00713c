"""The search for the evidence of one task's rows: clean, withheld, and made worse on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bem.config import RetrievalConfig
from bem.errors import DataError
from bem.evidence.index import Hit, in_memory, open_index
from bem.evidence.leakage import near_duplicates
from bem.evidence.passages import Passage
from bem.evidence.rerank import Reranker
from bem.evidence.retriever import Evidence, Retriever
from bem.evidence.swap import corrupted, shuffled, swapped
from bem.tasks.record import Task
from bem.training.data import Example

Progress = Callable[[int, int], None]
"""(questions done, all questions)."""


class EvidenceFinder:
    """Finds the evidence of one task."""

    def __init__(self, task: Task, reranker: Reranker | None, on_progress: Progress | None):
        assert task.retrieval is not None
        self.task, self.config, self.reranker = task, task.retrieval, reranker
        self.on_progress, self.done = on_progress, 0
        if self.config.withheld and not any(row.gold_evidence for row in task.train):
            raise DataError(
                f"Task {task.name!r}: retrieval.withheld is {self.config.withheld:g}, but no training row says "
                "which of its evidence is gold (gold_evidence: [0]). Add it, or set withheld to 0."
            )
        self.dev, self.leaked = _without_leaks(task, self.config)
        conditions = 3 if self.config.swap else 1
        self.total = len(task.train) + conditions * len(self.dev)
        self.index: Any = None
        if self.config.source == "corpus":
            self.index = (
                open_index(self.config.index) if self.config.index else in_memory(task.corpus)
            )

    def run(self) -> dict[str, Any]:
        """Rows per part and condition as plain values, and facts about them."""
        failing = _chosen(self.task.train, self.config.withheld, self.config.seed)
        rows = {
            "train": self._rows(self.task.train, "clean", failing),
            "clean": self._rows(self.dev, "clean"),
        }
        if self.config.swap:
            for condition in ("corrupt", "shuffled"):
                rows[condition] = self._rows(self.dev, condition)
            rows["off"] = [
                replace(r, evidence=(), gold_evidence=(), relevance=()) for r in self.dev
            ]
        facts = {
            "leaked": self.leaked,
            "held_out": len(self.task.dev),
            "withheld": len(failing),
            "passages": len(self.index.passages) if self.index else None,
            "ranks": self._ranks() if self.index and any(map(_gold, self.dev)) else None,
        }
        return {"rows": {k: [asdict(r) for r in part] for k, part in rows.items()}, "facts": facts}

    def _rows(
        self, rows: Sequence[Example], condition: str, failing: frozenset[int] = frozenset()
    ) -> list[Example]:
        """Rows with evidence; of the rows `failing` the gold passages cannot be found."""
        if self.index is None:
            return self._ranked(rows, condition, failing)
        index = self.index
        if condition != "clean":
            index = swapped(index, _worse(index.passages, condition, self.config))
        evidence: dict[int, Evidence] = {}
        hidden = {rows[i].input: _gold(rows[i]) for i in failing}
        for part in (failing, frozenset(range(len(rows))) - failing):
            asked = sorted(part)
            retriever = self._retriever(_Hiding(index, hidden) if part is failing else index)
            searched = self._searched(retriever, [rows[i] for i in asked])
            evidence |= zip(asked, searched, strict=True)
        return [self._with(row, evidence[i], _gold(row)) for i, row in enumerate(rows)]

    def _searched(self, retriever: Retriever, rows: Sequence[Example]) -> list[Evidence]:
        before = self.done
        return retriever.retrieve_many(
            [row.input for row in rows], lambda done, _: self._tick(before + done)
        )

    def _ranked(
        self, rows: Sequence[Example], condition: str, failing: frozenset[int]
    ) -> list[Example]:
        """Rows whose own passages are ranked."""
        pool = [p for i, row in enumerate(rows) for p in _own(i, row)]
        shown = pool if condition == "clean" else _worse(pool, condition, self.config)
        by_id = {passage.id: passage for passage in shown}
        retriever, result = self._retriever(None), []
        for i, row in enumerate(rows):
            gold = _gold(row)
            own = _own(i, row)
            findable = [p for p in own if not (i in failing and _is_gold(p, gold))]
            evidence = retriever.rank(row.input, [by_id[p.id] for p in findable or own])
            result.append(self._with(row, evidence, gold))
            self._tick(self.done + 1)
        return result

    def _retriever(self, index: Any) -> Retriever:
        c = self.config
        most = max(c.candidates, c.shown)
        return Retriever(index, self.reranker, c.method, candidates=most, shown=c.shown)

    def _with(self, row: Example, evidence: Evidence, gold: frozenset[str]) -> Example:
        """The row with its evidence: the best passage last, next to the question."""
        passages, record = list(evidence.passages[::-1]), evidence.record
        if self.config.keep_order:
            passages.sort(key=lambda p: int(p.id.rsplit(":", 1)[1]))
        return replace(
            row,
            evidence=tuple(p.shown for p in passages),
            gold_evidence=tuple(i for i, p in enumerate(passages) if _is_gold(p, gold)),
            relevance=record.features() if record.reranked else (),
            meta={
                **row.meta,
                "sources": list(record.sources),
                "evidence_digest": record.digest,
            },
        )

    def _ranks(self) -> dict[str, list[int]]:
        """Place of the first gold passage among the candidates, 0 if it is not there: by the search,
        and by the reranker."""
        ranks: dict[str, list[int]] = {"search": [], "reranked": []}
        hits = self.index.search(
            [row.input for row in self.dev], self.config.candidates, self.config.method
        )
        for row, candidates in zip(self.dev, hits, strict=True):
            gold = _gold(row)
            places = [_is_gold(hit.passage, gold) for hit in candidates]
            ranks["search"].append(_first(places))
            if self.reranker and candidates:
                logits = self.reranker.logits(
                    row.input,
                    [h.passage.shown for h in candidates],
                    [h.lexical for h in candidates],
                )
                assert logits is not None  # no deadline was given
                places = [places[i] for i in np.argsort(-logits, kind="stable")]
            ranks["reranked"].append(_first(places))
        return ranks

    def _tick(self, done: int) -> None:
        self.done = done
        if self.on_progress:
            self.on_progress(done, self.total)


@dataclass(frozen=True)
class _Hiding:
    """An index that does not find, for each question, the passages hidden from it."""

    index: Any
    hidden: Mapping[str, frozenset[str]]

    def search(self, queries: Sequence[str], k: int = 10, method: Any = "bm25") -> list[list[Hit]]:
        most = max((len(self.hidden.get(q, ())) for q in queries), default=0)
        return [
            [h for h in hits if not _is_gold(h.passage, self.hidden.get(query, frozenset()))][:k]
            for query, hits in zip(
                queries, self.index.search(queries, k + most, method), strict=True
            )
        ]

    def tokens(self, text: str) -> list[str]:
        return self.index.tokens(text)

    def idf(self, term: str) -> float:
        return self.index.idf(term)


def _without_leaks(task: Task, config: RetrievalConfig) -> tuple[list[Example], int]:
    """Held-out rows whose answer passages are not nearly those of a training row, and how many were.

    A row that brings its own passages is compared as a whole: a single sentence of a story may well
    stand in another story. So is one that does not say which passage is gold; without any evidence, the
    question and its answer are compared.
    """

    def answer_passages(row: Example) -> frozenset[str]:
        if config.source == "corpus" and row.gold_evidence:
            return _gold(row)
        return frozenset(["\n".join(row.evidence) or f"{row.input}\n{row.answer}"])

    dev = task.dev
    trained = sorted({text for row in task.train for text in answer_passages(row)})
    held_out = [(i, text) for i, row in enumerate(dev) for text in sorted(answer_passages(row))]
    texts = [text for _, text in held_out]
    pairs = near_duplicates(texts, trained, config.leak_threshold) if trained else []
    leaked = {held_out[at][0] for at, _, _ in pairs}
    if dev and len(leaked) == len(dev):
        raise DataError(
            f"Every held-out row's answer passage ({len(dev)} of {len(dev)}) also stands in a training row: "
            "nothing would be measured but memory. Split by source document."
        )
    return [row for i, row in enumerate(dev) if i not in leaked], len(leaked)


def _chosen(rows: Sequence[Example], share: float, seed: int) -> frozenset[int]:
    count = round(share * len(rows))
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    return frozenset(int(i) for i in order[:count])


def _worse(passages: Sequence[Passage], condition: str, config: RetrievalConfig) -> list[Passage]:
    if condition == "corrupt":
        return corrupted(passages, config.corrupt_share, config.seed)
    return shuffled(passages, config.seed)


def _own(number: int, row: Example) -> list[Passage]:
    return [Passage(f"{number}:{i}", text) for i, text in enumerate(row.evidence)]


def _gold(row: Example) -> frozenset[str]:
    return frozenset(row.evidence[i] for i in row.gold_evidence)


def _is_gold(passage: Passage, gold: frozenset[str]) -> bool:
    """A row names its gold passage by text, with or without its title."""
    return passage.text in gold or passage.shown in gold


def _first(places: Sequence[bool]) -> int:
    return next((rank for rank, hit in enumerate(places, 1) if hit), 0)
