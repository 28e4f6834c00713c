import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bem.errors import DataError
from bem.stats.scores import (
    METRICS,
    Metric,
    exact_match,
    json_validity,
    normalize_answer,
    sentence_bleu,
    sentence_chrf,
    token_f1,
)


def test_normalisation_follows_squad():
    assert normalize_answer("  The  Cat,\nsat on AN apple! ") == "cat sat on apple"
    assert normalize_answer("theatre a-b") == "theatre ab"  # articles are whole words only


def test_exact_match_takes_the_best_reference():
    assert exact_match("The Eiffel Tower.", ["Paris", "eiffel tower"]) == 1.0
    assert exact_match("Eiffel", ["Paris", "eiffel tower"]) == 0.0


def test_token_f1_by_hand():
    # {cat, sat, mat} against {cat, sat}: precision 2/3, recall 1
    assert token_f1("a cat sat, mat", ["the cat sat"]) == pytest.approx(0.8)
    assert token_f1("a cat sat, mat", ["dog", "cat sat mat"]) == 1.0
    assert token_f1("cat cat cat", ["cat"]) == pytest.approx(0.5)  # multiplicity counts


def test_empty_answers_agree_only_with_empty_references():
    assert token_f1("the", [""]) == 1.0
    assert token_f1("", ["cat"]) == 0.0
    assert exact_match("", [""]) == 1.0


def test_no_references_mean_that_the_right_answer_is_empty():
    """SQuAD 2.0: 1 for an empty answer to an unanswerable question, 0 for any other."""
    assert exact_match("", []) == token_f1("", []) == exact_match(" The. ", []) == 1.0
    assert exact_match("x", []) == token_f1("x", []) == 0.0


def test_references_must_be_a_list():
    with pytest.raises(TypeError, match="list"):
        exact_match("a", "a")
    with pytest.raises(ValueError, match="empty"):
        sentence_chrf("a", [])


@given(st.text(max_size=40), st.text(max_size=40))
def test_f1_is_symmetric_bounded_and_one_for_exact_matches(a, b):
    f1 = token_f1(a, [b])
    assert 0.0 <= f1 <= 1.0
    assert f1 == pytest.approx(token_f1(b, [a]))
    if exact_match(a, [b]):
        assert f1 == 1.0


@pytest.mark.parametrize(
    "text", ['{"a": [1, null]}', "[]", ' {"a": {}} \n', '{"a": ' + "1" * 5000 + "}"]
)
def test_objects_and_arrays_are_valid(text):
    assert json_validity(text) == 1.0


@pytest.mark.parametrize(
    "text", ["", "7", '"word"', "{'a': 1}", '{"a": NaN}', "[1] trailing", "[" * 100_000]
)
def test_everything_else_is_not(text):
    assert json_validity(text) == 0.0


def test_sentence_scores_are_sacrebleus():
    import sacrebleu

    answer, refs = "the cat sat on the mat", ["the cat lay on a mat", "a cat on a mat"]
    assert sentence_chrf(answer, refs) == sacrebleu.sentence_chrf(answer, refs).score
    assert sentence_bleu(answer, refs) == sacrebleu.sentence_bleu(answer, refs).score


def test_only_loss_is_better_when_lower():
    assert [name for name, m in METRICS.items() if not m.higher_is_better] == ["loss"]


@pytest.mark.parametrize(
    ("name", "limits"),
    [("em", (0, 1)), ("f1", (0, 1)), ("validity", (0, 1)), ("acc", (0, 1)), ("exact_match", (0, 1)),
     ("chrf", (0, 100)), ("bleu", (0, 100)), ("loss", (-np.inf, np.inf))],
)  # fmt: skip
def test_a_metric_knows_its_range(name, limits):
    assert METRICS[name].limits == limits


def test_twice_the_scale_is_another_unit_and_a_metric_without_points_has_none():
    assert Metric(True, 100.0).limits == (-2, 2)
    assert Metric(True, 1.0).limits == (-200, 200)
    assert Metric(True, 1.0, range=(0, 5)).limits == (0, 5)
    assert Metric(False, None).limits == (-np.inf, np.inf)


@pytest.mark.parametrize(
    "values",
    [(True, 0), (True, -1), (True, np.nan), (True, np.inf), (True, "100"), ("yes", 100),
     (True, 1, "median"), (True, 1, "mean", (1, 0)), (True, 1, "mean", (0,)), (True, 1, "mean", ("a", 1))],
)  # fmt: skip
def test_a_metric_that_means_nothing_is_refused(values):
    with pytest.raises(DataError):
        Metric(*values)
