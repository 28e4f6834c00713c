import numpy as np
import pytest

from bem.online.betting import FRACTIONS, Bet, answered_wealth, paired_wealth


def test_one_bet_by_hand():
    """wealth = mean over l of 1 + l (z - m), l up to .9 / (width + m) for z in [-1, 1]."""
    bet = Bet(-0.1, 1.0, None, fallen=False)
    bet.paired(0.4)
    assert bet.best == pytest.approx(np.mean(1 + FRACTIONS / 0.9 * 0.5))


@pytest.mark.parametrize("fallen", [False, True])
@pytest.mark.parametrize("share", [None, 0.1, 0.5])
def test_no_factor_is_ever_negative(fallen, share):
    """The worst that can happen leaves a tenth of the wealth to the boldest bet."""
    worst = []
    for candidate in (True, False):
        for score in (0.0, 1.0):
            bet = Bet(-0.05, 1.0, share, fallen)
            if share is None:
                bet.paired(1.0 if fallen else -1.0)
            else:
                bet.answered(candidate, score)
            worst.append(np.exp(bet.log_wealth).min())
    assert min(worst) == pytest.approx(0.1)


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("fallen", [False, True])
def test_under_the_null_of_traffic_the_wealth_stays_the_same_in_expectation(share, fallen):
    """Exact: the expectation over the coin and over scores 0 and 1, at the border of the null."""
    p_old, p_new, null = 0.6, 0.5, -0.1
    expected = np.zeros(len(FRACTIONS))
    for candidate, chance, p in ((True, share, p_new), (False, 1 - share, p_old)):
        for score, weight in ((1.0, p), (0.0, 1 - p)):
            bet = Bet(null, 1.0, share, fallen)
            bet._seen, bet._sum = 50, 20.0  # any c that was known before
            bet.answered(candidate, score)
            expected += chance * weight * np.exp(bet.log_wealth)
    np.testing.assert_allclose(expected, 1.0, rtol=1e-12)


def test_many_runs_at_once_are_the_bets_one_by_one():
    rng = np.random.default_rng(0)
    d, x, arm = rng.uniform(-1, 1, (2, 50)), rng.random((2, 50)), rng.random((2, 50)) < 0.3
    for fallen in (False, True):
        paired = paired_wealth(d, -0.02, 1.0, fallen)
        traffic = answered_wealth(arm, x, -0.02, 1.0, 0.3, fallen)
        for run in range(2):
            one, two = Bet(-0.02, 1.0, None, fallen), Bet(-0.02, 1.0, 0.3, fallen)
            for t in range(50):
                one.paired(d[run, t])
                two.answered(bool(arm[run, t]), x[run, t])
                assert one.best == pytest.approx(max(1.0, paired[run, : t + 1].max()))
                assert two.best == pytest.approx(max(1.0, traffic[run, : t + 1].max()))


def test_at_the_border_of_the_null_few_runs_ever_reach_the_bar():
    """Ville: 5 % at any of 400 looks; 400 runs, so that 7.5 % would be 2.3 standard errors too many."""
    d = np.random.default_rng(1).choice([-1.0, 1.0], (400, 400)) * 0.5
    for fallen in (False, True):
        reached = (paired_wealth(d, 0.0, 1.0, fallen) >= 20).any(1)
        assert 0 < reached.mean() < 0.075
