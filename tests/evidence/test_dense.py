import sys

import numpy as np
import pytest

from bem.errors import DataError, MissingExtra
from bem.evidence import dense
from bem.evidence.dense import Dense, Whitening
from bem.evidence.passages import Passage

RNG = np.random.default_rng(0)


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Scripted:
    """An encoder with a vector for every text, which counts what it is asked for."""

    name, hash = "scripted", "0" * 64

    def __init__(self, vectors, whiten=False):
        self.vectors, self.whiten = vectors, whiten
        self.dimension = len(next(iter(vectors.values())))
        self.asked = []

    def encode(self, texts, on_progress=None):
        self.asked.extend(texts)
        return np.array([self.vectors[text] for text in texts])


def corpus(n, d=8, whiten=False):
    passages = [Passage(f"p{i}", f"text {i}") for i in range(n)]
    vectors = unit(RNG.normal(size=(n, d)))
    return passages, Scripted({p.text: v for p, v in zip(passages, vectors, strict=True)}, whiten)


def test_whitened_vectors_vary_equally_in_all_directions():
    vectors = RNG.normal(size=(5000, 6)) @ np.diag([9, 4, 2, 1, 0.5, 0.1]) + 7
    whitening = Whitening.fit(vectors.astype(np.float32))
    white = (vectors - whitening.mean) @ whitening.map
    np.testing.assert_allclose(np.cov(white.T), np.eye(6), atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(whitening.apply(vectors), axis=1), 1, atol=1e-5)


def test_the_corpus_mean_and_a_direction_without_variance_stay_finite():
    vectors = RNG.normal(size=(100, 3)).astype(np.float32)
    vectors[:, 2] = 0.5
    whitening = Whitening.fit(vectors)
    assert np.isfinite(whitening.apply(vectors)).all()
    assert not whitening.apply(whitening.mean[None]).any()


def test_a_corpus_of_one_vector_whitens_to_nothing_instead_of_nan():
    same = np.tile(unit(np.ones((1, 4))), (50, 1))
    assert np.isfinite(Whitening.fit(same).apply(same)).all()


def test_search_is_the_sorted_matrix_product_over_any_number_of_blocks(monkeypatch):
    vectors, queries = unit(RNG.normal(size=(50, 8))), unit(RNG.normal(size=(3, 8)))
    monkeypatch.setattr(dense, "ROWS", 7)
    monkeypatch.setattr(dense, "QUERIES", 2)
    for query, found in zip(queries, Dense(vectors, None).search(queries, 10), strict=True):
        product = vectors @ query
        assert [i for i, _ in found] == np.argsort(-product)[:10].tolist()
        np.testing.assert_allclose([s for _, s in found], np.sort(product)[::-1][:10], rtol=1e-5)


def test_more_than_there_is_gives_all():
    assert len(Dense(unit(RNG.normal(size=(3, 8))), None).search(unit(np.ones((1, 8))), 10)[0]) == 3


def test_the_graph_finds_what_the_matrix_product_finds(tmp_path):
    pytest.importorskip("faiss")
    passages, encoder = corpus(500)
    dense.write(tmp_path, passages, encoder, graph=True, on_progress=lambda *_: None)
    queries = unit(RNG.normal(size=(20, 8)))
    graph = Dense.load(tmp_path, graph=True).search(queries, 10)
    exact = Dense.load(tmp_path, graph=False).search(queries, 10)
    hits = sum(len(dict(g).keys() & dict(e).keys()) for g, e in zip(graph, exact, strict=True))
    assert hits >= 198  # of 200
    assert dict(graph[0])[exact[0][0][0]] == pytest.approx(exact[0][0][1], abs=1e-5)


def test_an_interrupted_build_does_not_encode_again(tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "BLOCK", 10)
    passages, encoder = corpus(35, whiten=True)

    def stop(stage, done, total):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dense.write(tmp_path, passages, encoder, graph=False, on_progress=stop)
    encoder.asked.clear()
    dense.write(tmp_path, passages, encoder, graph=False, on_progress=lambda *_: None)
    assert encoder.asked == [p.text for p in passages[20:]]
    at_once = dense.in_memory(passages, encoder)
    assert np.array_equal(Dense.load(tmp_path, graph=False).vectors, at_once.vectors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vectors.npy", "whitening.npz"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 2.0])
def test_what_is_no_unit_vector_is_refused_with_the_passage(value):
    passages, encoder = corpus(3)
    encoder.vectors["text 1"] = np.full(8, value, np.float32)
    with pytest.raises(DataError, match=r"passage 'p1' \('text 1'\) a vector of norm"):
        dense.in_memory(passages, encoder)


def test_a_wrong_shape_is_refused():
    _, encoder = corpus(3)
    encoder.dimension = 5
    with pytest.raises(DataError, match=r"shape \(1, 8\) for 1 texts, expected \(1, 5\)"):
        dense.embed(encoder, ["text 0"], ["query 1"])


def test_without_faiss_a_graph_is_refused_not_replaced(tmp_path, monkeypatch):
    passages, encoder = corpus(3)
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(dense.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="faiss-cpu"):
        dense.write(tmp_path, passages, encoder, graph=True, on_progress=lambda *_: None)
