"""Evidence for a task's rows: searched, reranked, and, for the held-out rows, made worse on purpose.

    rows -> leaked rows out -> clean evidence (train, dev) -> dev again with a corrupt, a shuffled, no index

The rows with their evidence are kept beside the run, so that every process and every resumption reads the same rows.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bem
from bem.evidence.passages import Passage, corpus_hash
from bem.evidence.rerank import Reranker, load_reranker
from bem.files import sha256_json, write_bytes
from bem.tasks.finder import EvidenceFinder, Progress
from bem.tasks.record import Task
from bem.training.data import Example, data_hash

FORMAT = "bem-evidence-1"


def with_evidence(task: Task, folder: Path | None, on_progress: Progress | None = None) -> Task:
    """The task with evidence in its rows, `variants` of the held-out ones, and `facts` on both.

    Args:
        folder: where the rows with their evidence are kept and looked up; None: nowhere.
        on_progress: called with (questions done, all questions).
    Raises:
        DataError: no passages, an unknown gold passage, or every held-out row leaks.
    """
    if task.retrieval is None:
        return task
    if task.validation:
        searched = replace(task, train=[*task.train, *task.validation], validation=[])
        found = with_evidence(searched, folder, on_progress)
        own = len(task.train)
        return replace(found, train=found.train[:own], validation=found.train[own:])
    reranker = None if task.retrieval.reranker == "none" else load_reranker(task.retrieval.reranker)
    key = _key(task, reranker)
    path = folder / f"{task.name}-{key[:12]}.json.gz" if folder else None
    content = _read(path, key) if path else None
    if content is None:
        content = EvidenceFinder(task, reranker, on_progress).run()
        if path:
            text = json.dumps({"format": FORMAT, "key": key, **content}, ensure_ascii=False)
            write_bytes(path, gzip.compress(text.encode("utf-8", "surrogatepass"), 3))
    rows = {name: [Example(**values) for values in part] for name, part in content["rows"].items()}
    return replace(
        task,
        train=rows.pop("train"),
        dev=rows.pop("clean"),
        variants=rows,
        facts=content["facts"],
    )


def _key(task: Task, reranker: Reranker | None) -> str:
    assert task.retrieval is not None
    return sha256_json(
        {
            "bem": bem.__version__,
            "retrieval": task.retrieval.model_dump(mode="json"),
            "reranker": reranker.name if reranker else None,
            "train": data_hash(task.train),
            "dev": data_hash(task.dev),
            "corpus": corpus_hash(task.corpus),
        }
    )


def _read(path: Path, key: str) -> dict[str, Any] | None:
    """The rows that were kept under this key; None if there are none, or others."""
    if not path.is_file():
        return None
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError):
        return None  # damaged: the search is done again
    fits = content.get("format") == FORMAT and content.get("key") == key
    return content if fits else None


def corpus_of(rows: Iterable[Example], corpora: Iterable[list[Passage]]) -> list[Passage]:
    """Every passage of the rows once, named by its first row, and then the further passages."""
    texts: dict[str, str] = {}
    for row in rows:
        for i, text in enumerate(row.evidence):
            texts.setdefault(text, f"{row.id}:{i}")
    passages = [Passage(name, text) for text, name in texts.items()]
    taken = {p.id for p in passages}
    for number, more in enumerate(corpora, 1):
        for p in more:
            name = p.id if p.id not in taken else f"corpus-{number}/{p.id}"
            taken.add(name)
            passages.append(replace(p, id=name))
    return passages
