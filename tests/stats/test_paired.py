from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, permutation_test

from bem.errors import DataError
from bem.stats.corpus import bleu_statistics, corpus_bleu
from bem.stats.paired import sign_flip_test, swap_test, variance_components


@pytest.mark.parametrize(
    ("gains", "losses", "ties"), [(4, 0, 26), (15, 5, 80), (30, 31, 9), (0, 7, 3)]
)
def test_on_exact_match_it_is_mcnemars_exact_test(gains, losses, ties):
    d = np.repeat([1.0, -1.0, 0.0], [gains, losses, ties])
    test = sign_flip_test(d)
    oracle = lambda side: binomtest(gains, gains + losses, alternative=side).pvalue  # noqa: E731
    assert test.method == "exact"
    assert test.n_discordant == gains + losses
    assert test.p_value == pytest.approx(oracle("two-sided"))
    assert test.p_greater == pytest.approx(oracle("greater"))
    assert test.p_less == pytest.approx(oracle("less"))


def test_four_gains_and_no_loss_by_hand():
    assert sign_flip_test([1, 1, 1, 1, 0, 0]).p_value == pytest.approx(2 / 16)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=9), st.sampled_from([0.0, 0.5]))
def test_the_exact_law_is_the_enumerated_one(values, margin):
    d = np.array(values) / 2 - margin
    sums = np.array([np.dot(signs, d) for signs in product([-1, 1], repeat=len(d))])
    test = sign_flip_test(np.array(values) / 2, margin=margin)
    assert test.p_greater == pytest.approx((sums >= d.sum() - 1e-9).mean())
    assert test.p_less == pytest.approx((sums <= d.sum() + 1e-9).mean())


def test_few_continuous_differences_are_enumerated():
    d = np.random.default_rng(0).normal(0.5, 1, 9)
    oracle = permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf)
    test = sign_flip_test(d)
    assert test.method == "enumeration"
    assert test.p_value == pytest.approx(oracle.pvalue)


def test_many_continuous_differences_are_sampled():
    d = np.random.default_rng(0).normal(0.15, 1, 300)
    oracle = permutation_test((d,), np.sum, permutation_type="samples", n_resamples=9999, rng=0)
    test = sign_flip_test(d, seed=1)
    assert test.method == "monte_carlo"
    assert test.p_value == pytest.approx(oracle.pvalue, abs=0.01)
    assert test == sign_flip_test(d, seed=1)
    assert sign_flip_test(d + 10).p_value == pytest.approx(2 / 10_001)  # never 0


def test_equal_sides_show_nothing():
    assert sign_flip_test(np.zeros(30)).p_value == 1.0


def test_whole_clusters_flip_together():
    d = np.repeat([1.0, 1.0, 1.0, 1.0], 10)  # 40 gains, but in four documents
    assert sign_flip_test(d, clusters=np.repeat(list("abcd"), 10)).p_value == pytest.approx(2 / 16)


def test_the_level_holds_under_the_null():
    rng = np.random.default_rng(0)
    p = [sign_flip_test(rng.choice([-1.0, 0, 1], size=40)).p_value for _ in range(500)]
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 500)


def test_swapping_corpora_finds_the_better_one_and_nothing_between_equals():
    rng = np.random.default_rng(0)
    words = list("abcdefgh")
    refs = [[" ".join(rng.choice(words, 8))] for _ in range(60)]
    copy = lambda q: [  # noqa: E731
        " ".join(w if rng.random() < q else "x" for w in r[0].split()) for r in refs
    ]
    good, bad = (bleu_statistics(copy(q), refs)[None] for q in (0.9, 0.6))
    assert swap_test(good, bad, corpus_bleu, n_resamples=999).p_greater == pytest.approx(1 / 1000)
    assert swap_test(good, good, corpus_bleu, n_resamples=999).p_value == 1.0


def test_variance_components_by_hand():
    between, within = variance_components([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]])
    assert within == pytest.approx(2.0)  # seeds differ by 2 everywhere
    assert between == pytest.approx(0.0)  # var of (1, 2, 3) is 1, of which 2/2 is seeds
    assert np.isnan(variance_components([[0.0, 1.0]])[1])


def test_nan_is_refused():
    with pytest.raises(DataError, match=r"differences\[1\]"):
        sign_flip_test([0.0, np.nan])


@pytest.mark.parametrize("unit", [1e-300, 1e-9, 1 / 3, 1e140])
def test_another_unit_of_the_scores_changes_no_p_value(unit):
    rng = np.random.default_rng(0)
    for d in (rng.normal(0.3, 1, 50), rng.normal(0.3, 1, 10), rng.integers(-1, 3, 40) * 1.0):
        assert sign_flip_test(d * unit) == sign_flip_test(d)
