"""What a real sentence encoder finds: BM25, its vectors, both fused, each with and without the tiny reranker.

    python benchmarks/retrieval_encoders.py DATA                 # writes benchmarks/results/retrieval_encoders.md
    python benchmarks/retrieval_encoders.py DATA --encoder all-mpnet-base-v2

The questions are all held-out ones of the sets of benchmarks/retrieval.py whose gold passage is known. The
passages are those of the question sets alone (retrieval.py searches 115,000): a real encoder reads some
twenty passages a second on one core. A reranker reads the first 20 and orders them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from retrieval import CANDIDATES, ROOT, SETS, TOP, _machine, _scores
from retrieval_choices import VECTOR_SETS, _vector_questions

from bem.evidence.encoders import load_encoder
from bem.evidence.index import Hit, Index, in_memory
from bem.evidence.passages import Passage, read_corpus
from bem.evidence.rerank import load_reranker
from bem.stats import bca_bootstrap

METHODS = ("bm25", "dense", "hybrid")
RERANKED = " + tiny reranker"
Found = dict[str, list[list[str]]]
"""Way to search -> for each question, ids of passages, best first."""


def found_by_all(index: Index, questions: list[dict[str, Any]]) -> tuple[Found, dict[str, float]]:
    """What every way finds, and its CPU milliseconds for one question."""
    reranker = load_reranker("tiny")
    texts = [row["text"] for row in questions]
    found: Found = {}
    costs: dict[str, float] = {}
    for method in METHODS:
        index.search(texts[:1], CANDIDATES, method)  # what loads when first used
        start = time.process_time()
        hits = index.search(texts, CANDIDATES, method)
        searched = time.process_time() - start
        found[method] = [[hit.passage.id for hit in each][:TOP] for each in hits]
        start = time.process_time()
        found[method + RERANKED] = [
            _reranked(reranker, text, each) for text, each in zip(texts, hits, strict=True)
        ]
        again = time.process_time() - start
        costs[method] = 1e3 * searched / len(texts)
        costs[method + RERANKED] = 1e3 * (searched + again) / len(texts)
        print(method, "done", flush=True)
    return found, costs


def _reranked(reranker: Any, text: str, hits: list[Hit]) -> list[str]:
    logits = reranker.logits(text, [h.passage.shown for h in hits], [h.lexical for h in hits])
    return [hits[i].passage.id for i in np.argsort(-logits, kind="stable")[:TOP]]


def table(found: Found, costs: dict[str, float], questions: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each way: MRR@10 of each set and of all, and its difference to two others."""
    golds = [set(row["gold"]) for row in questions]
    sets = np.array([row["set"] for row in questions])
    mrr = {way: _scores(ids, golds)[0] for way, ids in found.items()}
    yield (
        "| way | "
        + " | ".join(SETS)
        + " | all | against bm25 | against bm25"
        + RERANKED
        + " | ms a question |"
    )
    yield "|---|" + "---:|" * len(SETS) + "---:|---|---|---:|"
    for way, scores in mrr.items():
        each = [f"{scores[sets == name].mean():.3f}" for name in SETS]
        against = [
            "" if other == way else _difference(scores - mrr[other], questions)
            for other in ("bm25", "bm25" + RERANKED)
        ]
        cells = [way, *each, f"{scores.mean():.3f}", *against, f"{costs[way]:.1f}"]
        yield "| " + " | ".join(cells) + " |"


def _difference(differences: NDArray[np.float64], questions: list[dict[str, Any]]) -> str:
    """Mean and BCa 95 % interval; questions with the same gold passages are one cluster."""
    clusters = [" ".join(sorted(row["gold"])) for row in questions]
    result = bca_bootstrap(differences, clusters=clusters)
    return f"{differences.mean():+.3f} [{result.lower:+.3f}, {result.upper:+.3f}]"


def page(data: Path, name: str) -> str:
    """The results as Markdown."""
    files = [data / f"{each}.jsonl.gz" for each in VECTOR_SETS]
    texts = {p.shown: p for file in files for p in read_corpus(file)}
    passages = [Passage(f"p{i}", p.text, p.title) for i, p in enumerate(texts.values())]
    questions = _vector_questions(data, passages)
    encoder = load_encoder(name)
    start = time.process_time()
    index = in_memory(passages, encoder)
    seconds = time.process_time() - start
    print(f"{len(passages):,} passages in {seconds:.0f} s", flush=True)
    found, costs = found_by_all(index, questions)
    counts = ", ".join(f"{sum(q['set'] == s for q in questions)} of {s}" for s in SETS)
    return "\n".join(
        [
            "# Retrieval with a real encoder",
            f"\n`python benchmarks/retrieval_encoders.py DATA{'' if name == 'minilm' else f' --encoder {name}'}`\n",
            _machine(),
            f"\n{len(passages):,} passages, read by `{name}` in {seconds:.0f} CPU s (one thread); questions: {counts}. "
            "MRR@10; differences over all questions with BCa 95 % intervals, questions of one gold passage "
            "clustered. Time: CPU milliseconds of one thread, encoding the question included.\n",
            *table(found, costs, questions),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder of the public sets")
    parser.add_argument("--encoder", default="minilm", help="a name that `bem index build` takes")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/retrieval_encoders.md"
    )
    given = parser.parse_args()
    given.out.write_text(page(given.data, given.encoder), encoding="utf-8")


if __name__ == "__main__":
    main()
