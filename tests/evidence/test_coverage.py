import numpy as np
import pytest

from bem.evidence import coverage as measures
from bem.evidence.coverage import contradict, read, sentence


def tokens(text):
    return text.lower().replace(".", " ").split()


def even(term):
    return 1.0


def readings(*texts):
    return [read(text, tokens) for text in texts]


def test_coverage_is_the_idf_weighted_share_of_the_terms_that_any_passage_has():
    idf = {"nobel": 3.0, "physics": 2.0, "who": 1.0}
    shown = readings("nobel prize", "nobel physics")
    found = measures.coverage(["who", "nobel", "physics", "nobel"], shown, idf.get)
    assert found == pytest.approx((3 + 2) / 6)  # `who` is in no passage, `nobel` counts once


def test_coverage_reaches_one():
    assert measures.coverage(["moon"], readings("the moon"), even) == 1.0


def test_a_question_without_terms_is_not_covered():
    assert measures.coverage([], readings("the moon"), even) == 0.0


def test_consistency_is_one_minus_raos_quadratic_entropy():
    texts, p = ["a b b", "b c", "d"], np.array([0.9, 0.6, 0.3])
    idf = {"a": 1.0, "b": 0.5, "c": 2.0, "d": 1.5}
    b_twice = 0.5 * (1 + np.log(2))
    vectors = np.array([[1, b_twice, 0, 0], [0, 0.5, 2, 0], [0, 0, 0, 1.5]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    w = p / p.sum()
    rao = w @ (1 - vectors @ vectors.T) @ w
    assert measures.consistency(readings(*texts), p.tolist(), idf.get) == pytest.approx(1 - rao)


def test_one_passage_with_all_the_weight_is_consistent():
    shown = readings("the moon", "fish swim")
    assert measures.consistency(shown, [1.0, 0.0], even) == pytest.approx(1.0)
    assert measures.consistency(shown[:1], [0.2], even) == pytest.approx(1.0)
    assert measures.consistency(shown, [0.5, 0.5], even) == pytest.approx(0.5)


def test_consistency_of_passages_without_words_is_defined():
    assert measures.consistency(readings("", ""), [0.0, 0.0], even) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("The moon is 384 km away.", "The moon is 400 km away.", True),
        ("The moon is 384 km away.", "The moon is 384 km away in 1969.", False),
        ("The tower opened in 1,889.", "The tower opened in 1889.", False),
        ("He had three children.", "He had four children.", True),
        ("Mary is in the kitchen.", "Mary is not in the kitchen.", True),
        ("Mary isn’t in the kitchen.", "Mary is in the kitchen.", True),
        ("Nobody never left the kitchen.", "Somebody left the kitchen.", False),
        ("The moon is 384 km away.", "The fish weighs 400 grams.", False),
        ("Mary is in the kitchen.", "John is not in the garden.", False),
    ],
)
def test_contradictions_differ_in_polarity_or_numbers_about_the_same_thing(a, b, expected):
    idf = {"the": 0.1, "is": 0.1, "in": 0.1, "he": 0.1, "had": 0.2}
    assert contradict(read(a, tokens), read(b, tokens), lambda term: idf.get(term, 1.0)) is expected


def test_contradiction_is_the_weight_of_the_contradicting_pairs():
    shown = readings("the moon is 384 km away", "the moon is 400 km away", "fish swim")
    w = np.array([0.9, 0.6, 0.3]) / 1.8
    expected = 2 * w[0] * w[1]
    assert measures.contradiction(shown, [0.9, 0.6, 0.3], even) == pytest.approx(expected)
    assert measures.contradiction(shown[:1], [0.9], even) == 0.0


def test_a_sentence_is_read_as_words_numbers_and_polarity():
    said = sentence("It did not fall 1,200.5 m in two days", tokens)
    assert said.numbers == {1200.5, 2.0}
    assert said.negated
    assert said.content == {"it", "did", "fall", "m", "in", "days"}


def test_long_passages_are_read_up_to_a_limit_and_near_the_question():
    text = "Filler words here. " * 100 + "The moon is grey. " + "x " * 10_000_000
    found = read(text, tokens, "how grey is the moon")
    assert len(found.sentences) == measures.READ_SENTENCES
    assert "moon" in found.sentences[0].words
    assert sum(found.counts.values()) < measures.READ_CHARACTERS
