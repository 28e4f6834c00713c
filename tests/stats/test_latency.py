import numpy as np
import pytest
from scipy.stats import wilcoxon

from bem.errors import DataError
from bem.stats.latency import further_rounds, paired_ratio, rounds_needed


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


def timed(ratio, rounds, spread=0.05, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.lognormal(2, 0.2, rounds)
    return ratio * base * rng.lognormal(0, spread, rounds), base


def test_rounds_needed_by_hand():
    # (1.6449 + 0.8416)^2 (0.05 / ln(1.15 / 1.12))^2 pi / 3
    assert rounds_needed(1.12, 1.15, 0.05) == 24
    assert rounds_needed(1.18, 1.15, 0.05) == rounds_needed(1.15**2 / 1.18, 1.15, 0.05)
    assert rounds_needed(1.0, 1.15, 0.001) == 5
    assert rounds_needed(1.15, 1.15, 0.05) is None


def test_as_many_rounds_as_foretold_decide_as_often_as_foretold():
    n = rounds_needed(1.10, 1.15, 0.05)
    passed = [paired_ratio(*timed(1.10, n, seed=s)).within(1.15) for s in range(200)]
    assert 0.72 <= np.mean([p is True for p in passed]) <= 0.9


def test_no_further_rounds_once_the_answer_is_there_or_the_budget_spent():
    for ratio in (1.0, 1.4):
        assert further_rounds(*timed(ratio, 20), 1.15, budget=100) == 0
    near = timed(1.145, 20)
    assert further_rounds(*near, 1.15, budget=20) == 0
    assert further_rounds(*near, 1.15, budget=25) == 5
    assert further_rounds(*near, 1.15, budget=1000) == 20  # at most as many again


def test_the_first_rounds_are_those_that_a_limit_needs():
    assert further_rounds([], [], 1.15, budget=50) == 5
    assert further_rounds(*timed(1.0, 3), 1.15, budget=50) == 2


def test_looking_on_the_way_does_not_let_slow_arms_pass():
    def passes(seed):
        candidate, baseline = timed(1.15, 160, seed=seed)  # on the limit: may pass in 5 %
        n = 5
        while more := further_rounds(candidate[:n], baseline[:n], 1.15, budget=160):
            n += more
        return paired_ratio(candidate[:n], baseline[:n]).within(1.15) is True

    assert np.mean([passes(seed) for seed in range(300)]) <= 0.05 + 0.03


@pytest.mark.parametrize(("ratio", "within"), [(1.0, True), (1.4, False), (1.13, None)])
def test_within_tells_by_the_limits(ratio, within):
    assert paired_ratio(*timed(ratio, 30)).within(1.15) is within
