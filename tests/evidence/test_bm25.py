import math

import numpy as np
import pytest

from bem.evidence import bm25
from bem.evidence.bm25 import Bm25, tokens, words

TEXTS = [
    "The cat sat on the mat",
    "A dog chased the cat, and the cat ran",
    "Quantum computers factor large numbers",
    "",
]


def by_the_formula(query, texts):
    """BM25 from the definition, with a plain loop."""
    documents = [bm25.stem(words(text)) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for term in tokens(query):
            df = sum(term in d for d in documents)
            tf = document.count(term)
            norm = bm25.K1 * (1 - bm25.B + bm25.B * len(document) / mean)
            if tf:
                score += math.log(1 + (len(texts) - df + 0.5) / (df + 0.5)) * tf / (tf + norm)
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["cat", "cats chasing dogs", "large quantum cat cat", "zebra"])
def test_scores_are_those_of_the_definition(query):
    found = Bm25.build(TEXTS).scores(query)
    np.testing.assert_allclose(found, by_the_formula(query, TEXTS), rtol=1e-5, atol=1e-7)


def test_scores_equal_rank_bm25_up_to_its_idf():
    rank_bm25 = pytest.importorskip("rank_bm25")
    documents = [bm25.stem(words(text)) for text in TEXTS]
    other = rank_bm25.BM25Okapi(documents, k1=bm25.K1, b=bm25.B)
    ours = Bm25.build(TEXTS)
    theirs = other.get_scores(["dog"]) / other.idf["dog"] / (bm25.K1 + 1)
    np.testing.assert_allclose(ours.scores("dog") / ours.idf("dog"), theirs, rtol=1e-5)


def test_idf_by_hand():
    index = Bm25.build(TEXTS)  # `cat` is in 2 of 4 texts, `dog` in 1
    assert index.idf("cat") == pytest.approx(math.log(1 + 2.5 / 2.5))
    assert index.idf("dog") == pytest.approx(math.log(1 + 3.5 / 1.5))
    assert index.idf("zebra") == pytest.approx(math.log(1 + 4.5 / 0.5))


def test_words_of_any_script():
    assert words("Don't STOP: 3 ½-Straße ﬁne") == [
        "don",
        "t",
        "stop",
        "3",
        "1",
        "2",
        "strasse",
        "fine",
    ]
    assert words("snake_case os.path") == ["snake", "case", "os", "path"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]  # vowel signs stay in the word
    assert words("cafe\u0301") == words("café") == ["café"]
    assert words("東京都 iPhone手机") == ["東京", "京都", "iphone", "手机"]
    assert words("雨") == ["雨"]
    assert words("!?… \u200b") == []


def test_function_words_count_only_when_there_is_nothing_else():
    assert tokens("Who is the author?") == ["author"]
    assert tokens("To be or not to be") == ["to", "be", "or", "not", "to", "be"]
    found = Bm25.build(["to be or not to be", "that is the question"]).scores("to be or not")
    assert found[0] > found[1] == 0


def test_unknown_words_and_texts_without_words_score_nothing():
    assert not Bm25.build(TEXTS).scores("Где находится библиотека").any()
    assert not Bm25.build(TEXTS).scores("").any()
    assert not Bm25.build(["!!", "??"]).scores("!! word").any()


def test_saved_and_memory_mapped_gives_the_same_bits(tmp_path):
    before = Bm25.build(TEXTS)
    before.save(tmp_path)
    after = Bm25.load(tmp_path)
    assert after.count == 4
    assert np.array_equal(before.scores("the cats"), after.scores("the cats"))
    assert before.idf("cat") == after.idf("cat")


def test_ten_megabytes_in_one_text():
    index = Bm25.build(["needle", "hay " * 2_500_000 + "needle"])
    short, long = index.scores("needle")
    assert short > long > 0
