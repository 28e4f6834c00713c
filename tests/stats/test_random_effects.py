import numpy as np
import pytest
from scipy.stats import chi2

from bem.stats.random_effects import shrink, spread_of

UNIT = np.eye(3)


def q_statistic(y, v, tau2):
    w = 1 / (v + tau2)
    return float((w * (y - (w * y).sum() / w.sum()) ** 2).sum())


@pytest.mark.parametrize("level", [0.5, 0.1])
def test_the_spread_solves_the_q_profile_at_its_level(level):
    y, v = np.array([9.0, 1.0, 4.0, 0.0]), np.array([1.0, 2.0, 1.0, 3.0])
    tau2 = spread_of(y, np.diag(v), level)
    assert q_statistic(y, v, tau2) == pytest.approx(chi2.ppf(1 - level, 3), rel=1e-5)


def test_estimates_that_noise_explains_have_no_spread():
    assert spread_of(np.array([1.0, 2.0, 1.5]), UNIT, 0.5) == 0.0


def test_alike_groups_become_their_inverse_variance_mean_with_its_error():
    shrunk = shrink(np.array([1.0, 2.0, 4.0]), np.diag([1.0, 1.0, 2.0]), 0.05, 0.1)
    assert shrunk.spread == 0.0
    assert shrunk.estimates == pytest.approx([2.0] * 3)  # (1 + 2 + 4/2) / 2.5
    assert shrunk.se == pytest.approx([0.4**0.5] * 3)
    assert not shrunk.alone.any()


def test_groups_far_apart_keep_their_own_estimates():
    y = np.array([-30.0, -10.0, 10.0, 30.0])
    shrunk = shrink(y, 4 * np.eye(4), outlying_level=1e-12, spread_level=0.5)
    assert shrunk.spread > 15
    assert shrunk.estimates == pytest.approx(y, abs=0.5)
    assert shrunk.se == pytest.approx([2.0] * 4, rel=0.05)


def test_a_group_that_differs_stands_alone_and_leaves_the_others_alike():
    y = np.array([-9.0, 1.0, 2.0, 1.5, 0.5])
    shrunk = shrink(y, np.eye(5), 0.05, 0.1)
    assert shrunk.alone.tolist() == [True, False, False, False, False]
    assert (shrunk.estimates[0], shrunk.se[0]) == (-9.0, 1.0)
    assert shrunk.spread == 0.0
    assert shrunk.estimates[1:] == pytest.approx([1.25] * 4)


def test_a_group_far_above_does_not_make_the_others_look_low():
    y = np.array([60.0, 1.0, 2.0, 1.5, 0.5])
    assert shrink(y, np.eye(5), 0.05, 0.1).alone.tolist() == [True] + [False] * 4


def test_alike_groups_are_rarely_told_apart():
    rng = np.random.default_rng(0)
    results = [shrink(rng.normal(size=10), np.eye(10), 0.05, 0.1) for _ in range(400)]
    assert np.mean([r.alone.any() for r in results]) <= 0.05 * 2 + 0.03  # either side
    assert 0.05 <= np.mean([r.spread > 0 for r in results]) <= 0.14


def test_limits_cover_the_truth_when_groups_overlap():
    # three halves of one set of 200: any two share 100 examples
    rng = np.random.default_rng(0)
    masks = np.array([np.r_[1, 1, 0, 0], np.r_[0, 1, 1, 0], np.r_[0, 0, 1, 1]]).repeat(50, axis=1)
    maps = masks / masks.sum(axis=1, keepdims=True)
    covariance = maps @ maps.T
    inside = []
    for _ in range(500):
        shrunk = shrink(maps @ rng.normal(size=200), covariance, 0.05, 0.1)
        inside.append(np.abs(shrunk.estimates) <= 1.96 * shrunk.se)
    assert 0.92 <= np.mean(inside) <= 0.98


def test_one_group_under_two_names_is_no_distance_from_itself():
    covariance = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    shrunk = shrink(np.array([2.0, 2.0, 1.0]), covariance, 0.05, 0.1)
    assert np.isfinite(shrunk.se).all() and not shrunk.alone.any()
    twins = shrink(np.array([2.0, 2.0]), covariance[:2, :2], 0.05, 0.1)
    assert twins.estimates == pytest.approx([2.0, 2.0])


def test_a_group_without_error_stands_alone():
    shrunk = shrink(np.array([0.0, 2.0, 1.0]), np.diag([0.0, 1.0, 1.0]), 0.05, 0.1)
    assert shrunk.alone.tolist() == [True, False, False]
    assert (shrunk.estimates[0], shrunk.se[0]) == (0.0, 0.0)


@pytest.mark.parametrize("k", [1, 2])
def test_few_groups_are_no_error(k):
    shrunk = shrink(np.arange(float(k)), np.eye(k), 0.05, 0.1)
    assert shrunk.alone.all() == (k == 1)
