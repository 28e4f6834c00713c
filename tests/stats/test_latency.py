import numpy as np
import pytest
from scipy.stats import wilcoxon

from bem.errors import DataError
from bem.stats.latency import paired_ratio


def test_a_constant_ratio_is_found_exactly():
    base = np.array([10.0, 11.0, 9.0, 30.0, 10.0])
    r = paired_ratio(1.1 * base, base)
    assert (r.ratio, r.lower, r.upper) == (
        pytest.approx(1.1),
        pytest.approx(1.1),
        pytest.approx(1.1),
    )


def test_five_rounds_by_hand():
    # P(W = 0) = 1/32 <= 0.05: the limits are the extreme Walsh averages
    ratios = np.exp([0.0, 0.1, 0.2, 0.3, 0.9])
    r = paired_ratio(ratios, np.ones(5))
    assert (r.lower, r.upper) == (pytest.approx(1.0), pytest.approx(np.exp(0.9)))
    # Walsh averages: 0 .05 .1 .1 .15 .15 .2 .2 .25 .3 .45 .5 .55 .6 .9
    assert r.ratio == pytest.approx(np.exp(0.2))


@pytest.mark.parametrize("rounds", [6, 15, 40, 90])
def test_limits_invert_scipys_signed_rank_test(rounds):
    d = np.random.default_rng(rounds).normal(0.05, 0.1, rounds)
    r = paired_ratio(np.exp(d), np.ones(rounds))
    method = "exact" if rounds < 60 else "approx"
    p = lambda shift, side: wilcoxon(d - shift, alternative=side, method=method).pvalue  # noqa: E731
    assert p(np.log(r.upper) + 1e-9, "less") <= 0.05 < p(np.log(r.upper) - 1e-2, "less")
    assert p(np.log(r.lower) - 1e-9, "greater") <= 0.05 < p(np.log(r.lower) + 1e-2, "greater")


def test_too_few_rounds_have_no_limits():
    r = paired_ratio([1.0, 1.1, 1.0, 1.2], [1.0, 1.0, 1.0, 1.0])
    assert (r.lower, r.upper) == (0.0, np.inf)


def test_one_outlier_does_not_move_the_ratio():
    base = np.full(15, 10.0)
    slow = base.copy()
    slow[3] = 500.0
    assert paired_ratio(slow, base).ratio == pytest.approx(1.0)


def test_unpaired_or_impossible_timings_are_refused():
    with pytest.raises(DataError, match="3 candidate rounds"):
        paired_ratio([1, 2, 3], [1, 2])
    with pytest.raises(DataError, match="positive"):
        paired_ratio([1, 0], [1, 2])
    with pytest.raises(DataError, match=r"candidate\[0\]"):
        paired_ratio([np.nan, 1], [1, 2])
