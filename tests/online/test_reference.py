import math

import numpy as np
import pytest

from bem.online.reference import Reference, chart_limit, learn, tail_rate


def run_length(slack, limit, rng, most=4000):
    """Steps until a CUSUM of independent standard normal steps alarms, by brute force."""
    statistic = 0.0
    for n, step in enumerate(rng.normal(0, 1, most), 1):
        statistic = max(0.0, statistic + step - slack)
        if statistic > limit:
            return n
    return most


def test_the_chart_alarms_as_rarely_as_the_limit_promises():
    """Siegmund's approximation against simulation: 150 steps between false alarms."""
    rng = np.random.default_rng(0)
    limit = chart_limit(0.5, 150)
    lengths = [run_length(0.5, limit, rng) for _ in range(400)]
    assert np.mean(lengths) == pytest.approx(150, rel=0.15)


def test_a_known_limit():
    """k = .5, h = 4 has 168 steps between false alarms of two sides, 336 of one (Montgomery, Statistical
    Quality Control, table 9.3)."""
    assert chart_limit(0.5, 336) == pytest.approx(4.0, abs=0.02)


def test_long_tails_of_bad_scores_lower_the_rate_and_raise_the_limit():
    assert tail_rate(0.5) == 1.0
    t = tail_rate(0.5, 0.4)
    assert 0.5 * t == pytest.approx(
        t**2 / 2 + 0.4 * t**3 / 6
    )  # log E e^(t step) = 0, to third order
    assert chart_limit(0.5, 1e5, 0.4) > chart_limit(0.5, 1e5)


def test_independent_scores_have_no_rhythm_to_speak_of_and_no_inflation():
    learned = [
        learn(np.random.default_rng(seed).normal(0.7, 0.1, 1000), 2e6, None) for seed in range(20)
    ]
    assert np.median([r.rhythm for r in learned]) < 0.05
    assert 1.0 <= np.mean([r.inflation for r in learned]) < 1.2
    assert {r.block for r in learned} <= {20, 30}


def test_correlated_scores_are_worth_fewer():
    """The variance of a long mean of an AR(1) with rho = .5 is (1 + rho) / (1 - rho) = 3 times as large."""
    rng = np.random.default_rng(0)
    x = np.zeros(4000)
    for t in range(1, len(x)):
        x[t] = 0.5 * x[t - 1] + rng.normal()
    assert learn(x, 2e6, None).inflation == pytest.approx(3, rel=0.25)


def test_a_rhythm_is_found_with_its_amplitude():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, 2000) + 0.5 * np.sin(2 * np.pi * np.arange(2000) / 700)
    assert learn(x, 2e6, None).rhythm == pytest.approx(0.5 / x.std(), abs=0.08)


def test_a_season_of_known_period_is_learned_and_leaves_the_noise():
    """Level .7, cosine .03 and sine .04: an amplitude of .05, half a standard deviation of the noise."""
    rng, t = np.random.default_rng(0), np.arange(2000)
    season = 0.03 * np.cos(2 * np.pi * t / 900) + 0.04 * np.sin(2 * np.pi * t / 900)
    x = 0.7 + season + rng.normal(0, 0.1, 2000)
    r = learn(x, 2e6, None, period=900)
    assert r.mean == pytest.approx(0.7, abs=0.008)
    assert r.season == pytest.approx((0.03, 0.04), abs=0.01)
    assert r.expected(t) == pytest.approx(season, abs=0.02)
    unknown = learn(x, 2e6, None)
    assert r.rhythm == pytest.approx(0.05 / x.std(), abs=0.1)
    assert r.slack * r.block_sd < unknown.slack * unknown.block_sd - 0.02


def test_a_constant_reference_still_has_a_noise():
    assert learn(np.full(1000, 0.7), 2e6, None).sd == 1e-9
    assert learn(np.ones(1000), 2e6, (0.0, 1.0)).sd == pytest.approx(1 / math.sqrt(1000))


def test_one_block_never_alarms_alone():
    reference = learn(np.random.default_rng(0).normal(0.7, 0.1, 1000), 2e6, None)
    assert (
        reference.most - reference.slack < reference.limit < 2 * (reference.most - reference.slack)
    )


def test_the_smallest_fall_is_what_sums_up_to_the_limit_within_300_scores():
    r = Reference(1000, 0.7, 0.1, 0.0, 1.0, 0.0, 20, 0.1 / math.sqrt(20), 0.8, 9.0)
    deviation = r.smallest_fall * r.sd / r.block_sd
    assert 15 * (deviation - r.slack) == pytest.approx(r.limit)
