"""Dense retrieval: passages whose vectors point the same way as the query's.

Vectors of a language model's own states share large common directions that say nothing about their
meaning. Where the encoder asks for it (`whiten`), the corpus mean is removed and all directions get
the same variance, in passages and queries alike:

    x' = (x - mean) U (Λ + ε max Λ)^(-1/2)      U Λ Uᵀ = covariance of the corpus

(Su et al. 2021, "Whitening Sentence Representations", arXiv:2103.15316, with ε added so that directions
of no variance stay small.) It is fitted when the index is built and stored with it.

Up to 100,000 passages the search is one matrix product, exact. From there on it is a graph (HNSW,
Malkov & Yashunin 2018, by FAISS), unless the index is built with `exact=True`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bem.errors import DataError, MissingExtra
from bem.evidence import fusion
from bem.evidence.encoders import Encoder
from bem.evidence.passages import Passage
from bem.files import whole

FAISS_FROM = 100_000
"""Passages from which on a graph is searched instead of every vector."""
BLOCK = 2048
"""Passages encoded between two points from which an interrupted build resumes."""
ROWS = 65_536
"""Vectors per matrix product ..."""
QUERIES = 32
"""... and queries: a bound on the memory of a search (8 MiB of products)."""
LEAST_PER_DIMENSION = 4
"""Passages per dimension below which a corpus cannot be whitened: vectors are used as they are."""
RIDGE = 1e-6
"""Share of the largest variance added to each: ε above."""
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 100, 256

VECTORS, WHITENING, GRAPH = "vectors.npy", "whitening.npz", "vectors.faiss"
RAW, RAW_DONE = "raw.npy", "raw.json"
"""Vectors as the encoder gave them, while a build goes on, and how many of them."""
FILES = (VECTORS, WHITENING, GRAPH, RAW, RAW_DONE)


@dataclass(frozen=True)
class Whitening:
    """The linear map after which a corpus varies equally in all directions."""

    mean: NDArray[np.float32]  # [d]
    map: NDArray[np.float32]  # [d, d]

    @classmethod
    def fit(cls, vectors: NDArray[np.float32]) -> Whitening:
        """Of vectors [n, d]."""
        n, d = vectors.shape
        total, products = np.zeros(d), np.zeros((d, d))
        for start in range(0, n, ROWS):
            block = vectors[start : start + ROWS].astype(np.float64)
            total += block.sum(axis=0)
            products += block.T @ block
        mean = total / n
        variances, directions = np.linalg.eigh(products / n - np.outer(mean, mean))
        variances = np.maximum(variances, 0) + RIDGE * max(variances[-1], 1e-6)
        return cls(mean.astype(np.float32), (directions / np.sqrt(variances)).astype(np.float32))

    def apply(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Whitened vectors [n, d], unit norm again (zero for the corpus mean itself)."""
        white = (vectors - self.mean) @ self.map
        norms = np.linalg.norm(white, axis=1, keepdims=True)
        return np.where(norms > 1e-6, white / np.maximum(norms, 1e-6), 0).astype(np.float32)


class Dense:
    """Vectors of all passages, [n, d] with unit norm, and how to search them."""

    def __init__(
        self, vectors: NDArray[np.float32], whitening: Whitening | None, graph: Any = None
    ):
        self.vectors = vectors
        self._whitening = whitening
        self._graph = graph  # a FAISS index, or None: every vector is looked at

    def prepare(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Query vectors [q, d] from the encoder as they are compared: whitened like the passages."""
        return queries if self._whitening is None else self._whitening.apply(queries)

    def search(self, queries: NDArray[np.float32], k: int) -> list[list[tuple[int, float]]]:
        """(position, cosine) of the k nearest passages of each query vector [q, d], best first."""
        queries = self.prepare(queries)
        k = min(k, len(self.vectors))
        if self._graph is not None:
            return self._through_graph(queries, k)
        blocks = range(0, len(queries), QUERIES)
        return [found for at in blocks for found in self._exact(queries[at : at + QUERIES], k)]

    def _exact(self, queries: NDArray[np.float32], k: int) -> list[list[tuple[int, float]]]:
        found: list[list[tuple[int, float]]] = [[] for _ in queries]
        for start in range(0, len(self.vectors), ROWS):
            products = queries @ self.vectors[start : start + ROWS].T
            for scores, so_far in zip(products, found, strict=True):
                so_far += [(start + i, float(scores[i])) for i in fusion.best(scores, k)]
        return [sorted(each, key=lambda pair: (-pair[1], pair[0]))[:k] for each in found]

    def _through_graph(self, queries: NDArray[np.float32], k: int) -> list[list[tuple[int, float]]]:
        faiss = _faiss()
        parameters = faiss.SearchParametersHNSW(efSearch=max(HNSW_SEARCH, 2 * k))
        scores, positions = self._graph.search(queries, k, params=parameters)
        return [
            [(int(i), float(s)) for i, s in zip(*pair, strict=True) if i >= 0]
            for pair in zip(positions, scores, strict=True)
        ]

    @classmethod
    def load(cls, generation: Path, graph: bool) -> Dense:
        """Memory-map the vectors that `write` left; `graph`: search through FAISS."""
        vectors = np.load(generation / VECTORS, mmap_mode="r")
        whitening = None
        if (generation / WHITENING).is_file():
            with np.load(generation / WHITENING) as stored:
                whitening = Whitening(stored["mean"], stored["map"])
        return cls(vectors, whitening, _read_graph(generation / GRAPH) if graph else None)


def in_memory(passages: Sequence[Passage], encoder: Encoder) -> Dense:
    """Vectors of a small corpus, searched exactly.

    Raises:
        DataError: the encoder gave something that is no unit vector; names the passage.
    """
    vectors = embed(encoder, [p.shown for p in passages], [f"passage {p.id!r}" for p in passages])
    whitening = _fit(vectors, encoder)
    return Dense(whitening.apply(vectors) if whitening else vectors, whitening)


def write(
    generation: Path,
    passages: Sequence[Passage],
    encoder: Encoder,
    graph: bool,
    on_progress: Callable[[str, int, int], None],
) -> None:
    """Encode all passages into a folder; what an interrupted call had encoded is kept.

    Raises:
        DataError: the encoder gave something that is no unit vector; names the passage.
        MissingExtra: a graph is wanted and FAISS is not installed.
    """
    if graph:
        require_faiss()
    if not (generation / VECTORS).is_file():
        raw = _encode(generation, passages, encoder, on_progress)
        _finish(generation, raw, encoder)
    if graph and not (generation / GRAPH).is_file():
        _write_graph(generation, on_progress)
    for leftover in _leftovers(generation):
        leftover.unlink(missing_ok=True)


def embed(encoder: Encoder, texts: Sequence[str], names: Sequence[str]) -> NDArray[np.float32]:
    """Vectors [n, d] of texts, checked.

    Raises:
        DataError: a vector is not finite or not of unit norm, or their shape is wrong.
    """
    vectors = np.asarray(encoder.encode(texts), np.float32)
    if vectors.shape != (len(texts), encoder.dimension):
        raise DataError(
            f"Encoder {encoder.name} gave vectors of shape {vectors.shape} for {len(texts)} texts, "
            f"expected ({len(texts)}, {encoder.dimension})."
        )
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < 1e-2))  # also true for NaN and inf
    if len(wrong):
        at = int(wrong[0])
        text = texts[at] if len(texts[at]) <= 60 else texts[at][:57] + "..."
        raise DataError(
            f"Encoder {encoder.name} gave {names[at]} ({text!r}) a vector of norm {norms[at]:.4g}; "
            f"a unit vector was expected ({len(wrong)} such of {len(texts)}). Check the encoder's "
            "weights, or leave this text out."
        )
    return vectors


def require_faiss() -> None:
    """MissingExtra if FAISS is not installed; says how to go without."""
    if importlib.util.find_spec("faiss") is None:
        raise MissingExtra(
            "faiss-cpu", "retrieval", f"Dense search over {FAISS_FROM:,} passages or more "
            "(`--exact` looks at every vector instead, `--encoder none` makes no vectors)"
        )  # fmt: skip


def _faiss() -> Any:
    require_faiss()
    return importlib.import_module("faiss")


def _fit(vectors: NDArray[np.float32], encoder: Encoder) -> Whitening | None:
    enough = len(vectors) >= LEAST_PER_DIMENSION * encoder.dimension
    return Whitening.fit(vectors) if encoder.whiten and enough else None


def _leftovers(generation: Path) -> list[Path]:
    return [generation / RAW, generation / RAW_DONE]


def _encode(
    generation: Path,
    passages: Sequence[Passage],
    encoder: Encoder,
    on_progress: Callable[[str, int, int], None],
) -> NDArray[np.float32]:
    """Vectors as the encoder gives them, written block by block."""
    path, mark = _leftovers(generation)
    done = json.loads(mark.read_text()) if path.is_file() and mark.is_file() else 0
    shape = (len(passages), encoder.dimension)
    mode = "r+" if done else "w+"
    raw = np.lib.format.open_memmap(
        path, mode, **({} if done else {"dtype": np.float32, "shape": shape})
    )
    on_progress("encoding", done, len(passages))
    for start in range(done, len(passages), BLOCK):
        block = passages[start : start + BLOCK]
        names = [f"passage {passage.id!r}" for passage in block]
        raw[start : start + len(block)] = embed(encoder, [p.shown for p in block], names)
        raw.flush()
        with whole(mark) as draft:  # only now do these vectors count as done
            draft.write_text(str(start + len(block)))
        on_progress("encoding", start + len(block), len(passages))
    return raw


def _finish(generation: Path, raw: NDArray[np.float32], encoder: Encoder) -> None:
    whitening = _fit(raw, encoder)
    if whitening is not None:
        with whole(generation / WHITENING) as draft, draft.open("wb") as file:
            np.savez(file, mean=whitening.mean, map=whitening.map)
    with whole(generation / VECTORS) as draft:
        final = np.lib.format.open_memmap(draft, "w+", dtype=np.float32, shape=raw.shape)
        for start in range(0, len(raw), ROWS):
            block = raw[start : start + ROWS]
            final[start : start + ROWS] = whitening.apply(block) if whitening else block
        final.flush()


def _write_graph(generation: Path, on_progress: Callable[[str, int, int], None]) -> None:
    faiss = _faiss()
    vectors = np.load(generation / VECTORS, mmap_mode="r")
    graph = faiss.IndexHNSWFlat(vectors.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = HNSW_BUILD
    for start in range(0, len(vectors), BLOCK):
        graph.add(np.ascontiguousarray(vectors[start : start + BLOCK]))
        on_progress("graph", min(start + BLOCK, len(vectors)), len(vectors))
    with whole(generation / GRAPH) as draft:
        faiss.write_index(graph, str(draft))


def _read_graph(path: Path) -> Any:
    faiss = _faiss()
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
