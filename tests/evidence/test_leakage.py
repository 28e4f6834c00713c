import numpy as np
import pytest

from bem.evidence.leakage import near_duplicates, shingles

TEXT = "the first nobel prize in physics was awarded in 1901 to wilhelm conrad röntgen of germany"


def test_shingles_are_runs_of_words_without_case_and_punctuation():
    assert shingles("A b, C. d", 3) == {("a", "b", "c"), ("b", "c", "d")}
    assert shingles("ﬁsh Straße", 1) == {("fish",), ("strasse",)}
    assert shingles("a b", 3) == {("a", "b")}
    assert shingles(" ?! ", 3) == frozenset()
    assert shingles("月亮是灰", 3) == {("月", "亮", "是"), ("亮", "是", "灰")}


def test_a_copy_has_similarity_one_whatever_its_case_and_punctuation():
    assert near_duplicates([TEXT.upper() + "!"], ["other words", TEXT]) == [(0, 1, 1.0)]


def test_similarity_is_the_jaccard_index_of_the_shingles():
    words = TEXT.split()  # 16 words: 12 shingles
    changed = " ".join([*words[:-1], "prussia"])  # the last shingle differs
    assert near_duplicates([changed], [TEXT], 0.8) == [(0, 0, 11 / 13)]
    assert near_duplicates([changed], [TEXT], 0.85) == []
    middle = " ".join([*words[:7], "given", *words[8:]])  # five differ
    assert near_duplicates([middle], [TEXT], 0.3) == [(0, 0, 7 / 17)]


def test_the_most_similar_training_text_is_named_and_of_equals_the_first():
    near = TEXT + " indeed"
    assert near_duplicates([TEXT], [near, TEXT, TEXT]) == [(0, 1, 1.0)]
    assert near_duplicates([TEXT], ["x", near, TEXT + " surely"]) == [(0, 1, 12 / 13)]


def test_texts_without_words_are_no_duplicates():
    assert near_duplicates(["", "?!", TEXT], ["", "!"]) == []
    assert near_duplicates([], [TEXT]) == near_duplicates([TEXT], []) == []


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 1.0])
@pytest.mark.parametrize("n", [1, 2])
def test_it_finds_what_comparing_all_pairs_finds(threshold, n):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), rng.integers(1, 12))) for _ in range(160)]
    held_out, training = texts[:60], texts[60:]
    expected = []
    for i, a in enumerate(held_out):
        found = []
        for j, b in enumerate(training):
            x, y = shingles(a, n), shingles(b, n)
            found.append((len(x & y) / len(x | y), -j))
        similarity, place = max(found)
        if similarity >= threshold:
            expected.append((i, -place, similarity))
    assert near_duplicates(held_out, training, threshold, n) == expected
    assert expected


def test_many_copies_of_one_text_cost_no_more_than_one():
    held_out = [TEXT + f" {i}" for i in range(300)]
    found = near_duplicates(held_out, [TEXT] * 5_000)
    assert [(i, j) for i, j, _ in found] == [(i, 0) for i in range(300)]


def test_a_pair_exactly_at_the_threshold_is_found():
    assert near_duplicates(["a b c d e f g"], ["a b c d e f g h i j"], 0.7, n=1) == [(0, 0, 0.7)]


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"threshold": 1.1}, {"n": 0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError):
        near_duplicates([TEXT], [TEXT], **options)
