"""Hashed tf-idf equals scikit-learn's where no two features share a bucket."""

import numpy as np
import pytest

from bem.safety.features import BUCKETS, tf_idf


def test_both_halves_have_length_one_and_lie_apart():
    index, value = tf_idf(
        "bread for my neighbour and bread", np.ones(2 * BUCKETS, dtype=np.float32)
    )
    words = index < BUCKETS
    assert np.square(value[words]).sum() == pytest.approx(1, rel=1e-5)
    assert np.square(value[~words]).sum() == pytest.approx(1, rel=1e-5)


def test_it_is_scikit_learns_tf_idf():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    texts = ["bread for my neighbour and bread", "the king of chess", "it's a loaf"]
    words = text.TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, use_idf=False, token_pattern=r"[^\W_]+(?:'[^\W_]+)?"
    )
    letters = text.TfidfVectorizer(
        analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, use_idf=False
    )
    for vectorizer, part in ((words, slice(0, BUCKETS)), (letters, slice(BUCKETS, None))):
        expected = vectorizer.fit_transform([t.replace("'", "") for t in texts]).toarray()
        for row, t in zip(expected, texts, strict=True):
            dense = np.zeros(2 * BUCKETS)
            index, value = tf_idf(t.replace("'", ""), np.ones(2 * BUCKETS, dtype=np.float32))
            np.add.at(dense, index, value)
            ours = np.sort(dense[part][dense[part] > 0])
            assert np.allclose(ours, np.sort(row[row > 0]), atol=1e-5)


def test_no_words_no_features():
    index, value = tf_idf("?!", np.ones(2 * BUCKETS, dtype=np.float32))
    assert len(index) == len(value) == 0
