"""Search over passages: BM25, dense, or both; on disk (`build`, `open_index`) or in memory.

    index = build(read_corpus("corpus.jsonl"), "my-index", encoder=PooledStates())
    for hit in index.search(["Who wrote the first program?"], k=3, method="hybrid")[0]:
        print(hit.score, hit.passage.shown)

Passages that show the same text are indexed once, under the first id; the manifest counts the copies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bem.errors import DataError
from bem.evidence import bm25, dense, fusion, storage
from bem.evidence.bm25 import Bm25
from bem.evidence.dense import Dense
from bem.evidence.encoders import Encoder, load_encoder
from bem.evidence.passages import Passage, corpus_hash, distinct
from bem.evidence.storage import EncoderFacts, Manifest, Progress, StoredPassages
from bem.files import locked, whole

Method = Literal["bm25", "dense", "hybrid"]
FUSED = 100
"""Passages that each method contributes to a hybrid ranking, at least."""
NEWS_EVERY = 4096  # passages between two reports of progress
ENTRIES = (storage.PASSAGES, storage.OFFSETS, storage.LEXICAL, *dense.FILES)
"""Names of what a build leaves in its generation."""


@dataclass(frozen=True)
class Hit:
    """One passage found."""

    passage: Passage
    score: float  # of the method: BM25 in nats, cosine, or reciprocal ranks
    lexical: float  # BM25 score of the passage for the query; 0 if they share no word


class Index:
    """Passages that can be searched; made by `build`, `open_index` or `in_memory`.

    Attributes:
        passages: the searchable ones, in the corpus' order; memory-mapped if the index is on disk.
        corpus_hash: of the corpus as it was given, copies included.
        encoder_facts: name and hash of the encoder of its vectors; None: BM25 alone.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        corpus_hash: str,
        lexical: Bm25,
        vectors: Dense | None = None,
        encoder: Encoder | None = None,
        encoder_facts: EncoderFacts | None = None,
    ):
        self.passages = passages
        self.corpus_hash = corpus_hash
        self.encoder_facts = encoder_facts
        self._bm25, self._dense, self._encoder = lexical, vectors, encoder

    def __len__(self) -> int:
        return len(self.passages)

    def search(
        self, queries: Sequence[str], k: int = 10, method: Method = "bm25"
    ) -> list[list[Hit]]:
        """The k best passages for each query, best first; ties in the corpus' order.

        BM25 finds only passages that share a word with the query, so possibly fewer than k, or
        none. Dense search always finds k, however far they are. Hybrid fuses both rankings.

        Raises:
            DataError: not a list of queries, k < 1, an unknown method, or vectors are asked of an
                index without them or for an encoder that did not make them.
        """
        if isinstance(queries, str):
            raise DataError("search takes a list of queries; put the one query into a list.")
        if k < 1 or method not in get_args(Method):
            raise DataError(
                f"k must be >= 1 and method one of {get_args(Method)}: {k}, {method!r}."
            )
        if not queries:
            return []
        if method == "bm25":
            return [self._lexical(query, k) for query in queries]
        depth = k if method == "dense" else max(k, FUSED)
        near = self._vectors().search(self._embed(queries), depth)
        return [self._with_vectors(q, n, k, method) for q, n in zip(queries, near, strict=True)]

    def tokens(self, text: str) -> list[str]:
        """Terms of a text as a query, in order: stems, English function words left out."""
        return bm25.tokens(text)

    def idf(self, term: str) -> float:
        """ln(1 + (N - df + .5) / (df + .5)) of a term as `tokens` gives it; df = 0 if unknown."""
        return self._bm25.idf(term)

    def _lexical(self, query: str, k: int) -> list[Hit]:
        scores = self._bm25.scores(query)
        best = fusion.best(scores, k, above=0.0)
        return self._hits([(i, float(scores[i])) for i in best], scores)

    def _with_vectors(
        self, query: str, near: list[tuple[int, float]], k: int, method: Method
    ) -> list[Hit]:
        scores = self._bm25.scores(query)
        if method == "hybrid":
            lexical = fusion.best(scores, max(k, FUSED), above=0.0)
            near = fusion.reciprocal_rank([lexical, [i for i, _ in near]])
        return self._hits(near[:k], scores)

    def _hits(self, ranked: list[tuple[int, float]], lexical: NDArray[np.float32]) -> list[Hit]:
        return [Hit(self.passages[i], score, float(lexical[i])) for i, score in ranked]

    def _vectors(self) -> Dense:
        if self._dense is None:
            raise DataError(
                "This index holds no vectors, so it answers method bm25 alone. Build it with an "
                "encoder: `bem index build CORPUS.jsonl --out DIR --encoder minilm`."
            )
        return self._dense

    def _embed(self, queries: Sequence[str]) -> NDArray[np.float32]:
        if self._encoder is None:
            assert self.encoder_facts is not None  # there are vectors
            encoder = load_encoder(self.encoder_facts.name)
            self.encoder_facts.check(encoder)
            self._encoder = encoder
        return dense.embed(self._encoder, queries, [f"query {i + 1}" for i in range(len(queries))])


def in_memory(passages: Sequence[Passage], encoder: Encoder | None = None) -> Index:
    """Index a small corpus without a folder; dense search is exact.

    Raises:
        DataError: no passages, one id for two texts, or an encoder that gives no unit vectors.
    """
    texts = distinct(passages)
    vectors = dense.in_memory(texts, encoder) if encoder else None
    lexical = Bm25.build(passage.shown for passage in texts)
    facts = EncoderFacts.of(encoder)
    return Index(texts, corpus_hash(passages), lexical, vectors, encoder, facts)


def build(
    passages: Sequence[Passage],
    folder: str | Path,
    encoder: Encoder | None = None,
    on_progress: Progress | None = None,
    exact: bool = False,
    force: bool = False,
) -> Index:
    """Index a corpus in a folder, and open it.

    An interrupted build goes on where it was when it is called again with the same corpus and
    encoder. Queries see what the folder held before until the new index is complete. Nothing is
    deleted that a build has not written.

    Args:
        passages: the corpus, in order.
        folder: made if it is not there.
        encoder: makes the vectors for dense and hybrid search; None: BM25 alone.
        on_progress: called with (stage, done, total).
        exact: look at every vector also in corpora of 100,000 passages or more.
        force: delete the vectors that another encoder made in this folder.
    Raises:
        DataError: no passages, one id for two texts, an encoder that gives no unit vectors, a folder
            with vectors that would be lost or with another program's manifest, or somebody else is
            building in it.
        MissingExtra: 100,000 passages or more, vectors, not `exact`, and no FAISS.
    """
    folder, news = Path(folder), on_progress or (lambda *_: None)
    texts = distinct(passages)
    graph = encoder is not None and not exact and len(texts) >= dense.FAISS_FROM
    if graph:
        dense.require_faiss()
    corpus, facts = corpus_hash(passages), EncoderFacts.of(encoder)
    search = "none" if encoder is None else "hnsw" if graph else "exact"
    busy = DataError(f"Another build is working in {folder}. Wait for it.")
    _make_folder(folder)
    with locked(folder / storage.LOCK, busy):
        generation = folder / _generation_name(corpus, facts, search)
        storage.refuse_foreign(folder)
        if not force:
            _refuse_lost_vectors(folder, facts, generation)
        _discard_if_damaged(folder, generation)
        generation.mkdir(exist_ok=True)
        _write_lexical(generation, texts, news)
        if encoder is not None:
            dense.write(generation, texts, encoder, graph, news)
        news("checksums", 0, 1)
        files = storage.describe_files(generation)
        copies = len(passages) - len(texts)
        manifest = Manifest(generation.name, corpus, len(texts), copies, facts, search, files)
        storage.publish(folder, manifest, ENTRIES)
        news("checksums", 1, 1)
    return open_index(folder, encoder, checksums=False)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot hold an index: {error}.") from error


def _refuse_lost_vectors(folder: Path, facts: EncoderFacts | None, generation: Path) -> None:
    """Vectors may have taken hours: a build with another encoder does not delete them unasked."""
    try:
        before = storage.read_manifest(folder).encoder
    except DataError:
        before = None
    if before is not None and (facts is None or facts.hash != before.hash):
        now = "without vectors" if facts is None else f"with encoder {facts.name}"
        raise DataError(
            f"{folder} holds vectors by encoder {before.name}; a build {now} deletes them. Build with "
            f"`--encoder {before.name}`, into another folder, or say `--force`."
        )
    others = [g for g in storage.generations(folder) if g != generation]
    unfinished = [g for g in others if any((g / f).exists() for f in (dense.VECTORS, dense.RAW))]
    if facts is None and before is None and unfinished:
        raise DataError(
            f"{unfinished[0]} holds vectors of a build that is not finished; a build without vectors "
            "deletes them. Run that build again, name another folder, or say `--force`."
        )


def open_index(folder: str | Path, encoder: Encoder | None = None, checksums: bool = True) -> Index:
    """Open an index by memory map; it stays as it is while the folder is rebuilt.

    Args:
        encoder: must be the one that made the vectors. None: loaded by the name in the manifest
            when a query first needs it.
        checksums: compare every file's sha256 with the manifest; without, only its size.
    Raises:
        DataError: no index, an unknown format, a file that is missing or changed, or another
            encoder than the manifest's; says which.
        MissingExtra: its vectors are searched by FAISS, which is not installed.
    """
    folder = Path(folder)
    manifest = storage.read_manifest(folder)
    while True:
        try:
            return _open(folder, manifest, encoder, checksums)
        except (DataError, FileNotFoundError):
            # A build may have replaced the generation between our two looks at the folder.
            before, manifest = manifest, storage.read_manifest(folder)
            if manifest == before:
                raise


def _open(folder: Path, manifest: Manifest, encoder: Encoder | None, checksums: bool) -> Index:
    if encoder is not None and manifest.encoder is not None:
        manifest.encoder.check(encoder)
    storage.check_files(folder, manifest, checksums)
    generation = folder / manifest.generation
    passages, lexical = StoredPassages(generation), Bm25.load(generation / storage.LEXICAL)
    counts = {"manifest": manifest.passages, "passages": len(passages), "bm25": lexical.count}
    vectors = None
    if manifest.encoder is not None:
        vectors = Dense.load(generation, graph=manifest.search == "hnsw")
        counts["vectors"] = len(vectors.vectors)
    if len(set(counts.values())) > 1:
        raise DataError(f"The parts of {folder} do not belong together: {counts}. Build it again.")
    return Index(passages, manifest.corpus_hash, lexical, vectors, encoder, manifest.encoder)


def _write_lexical(generation: Path, passages: Sequence[Passage], news: Progress) -> None:
    if not (generation / storage.OFFSETS).is_file():
        StoredPassages.write(generation, passages)
    if not (generation / storage.LEXICAL).is_dir():
        total = len(passages)

        def read(done: int) -> None:
            if done % NEWS_EVERY == 0 or done == total:
                news("words", done, total)

        lexical = Bm25.build((passage.shown for passage in passages), read)
        with whole(generation / storage.LEXICAL) as draft:
            draft.mkdir()
            lexical.save(draft)


def _discard_if_damaged(folder: Path, generation: Path) -> None:
    """What was finished once but has changed since is made anew, not trusted."""
    try:
        manifest = storage.read_manifest(folder)
    except DataError:
        return
    if manifest.generation == generation.name:
        try:
            storage.check_files(folder, manifest)
        except DataError:
            storage.remove_generation(generation, ENTRIES)


def _generation_name(corpus: str, facts: EncoderFacts | None, search: str) -> str:
    recipe = f"{storage.FORMAT} {corpus} {facts} {search} {bm25.K1} {bm25.B} {dense.RIDGE}"
    return "g-" + hashlib.sha256(recipe.encode()).hexdigest()[:16]
