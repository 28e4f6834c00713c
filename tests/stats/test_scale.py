import numpy as np
import pytest

from bem.stats.scale import Scale, standardised
from bem.stats.weights import Statistic, ratio


def test_a_mean_is_about_its_median_value_and_at_most_one_in_size():
    values = np.array([1e6, 1e6 + 3, 1e6 - 5, 1e6, 1e6 + 1])
    columns = np.stack([values, np.ones(5)], axis=1)
    statistic, scale = standardised(Statistic("x", columns, ratio))
    assert scale == Scale(shift=1e6, exponent=3)  # 2^3 is the first power above 5
    assert statistic.columns[:, 0].tolist() == [0, 3 / 8, -5 / 8, 0, 1 / 8]
    assert [scale.back(v) for v in statistic.columns[:, 0]] == values.tolist()
    assert [scale.there(v) for v in values] == statistic.columns[:, 0].tolist()


def test_sums_over_clusters_keep_their_sizes():
    columns = np.array(
        [[2.0, 2.0], [9.0, 3.0], [0.0, 0.0]]
    )  # means 1 and 3, and one not in the slice
    statistic, scale = standardised(Statistic("x", columns, ratio))
    assert statistic.columns[:, 1].tolist() == [2, 3, 0]
    mean = statistic.of(statistic.columns.sum(axis=0)[None])[0]
    assert scale.back(float(mean)) == pytest.approx(11 / 5)


def test_values_that_differ_by_rounding_alone_are_equal():
    sums = np.array([0.1 + 0.2, 0.3, 0.6])  # a cluster of two has twice the sum
    columns = np.stack([sums, [1, 1, 2]], axis=1)
    assert not standardised(Statistic("x", columns, ratio))[0].columns[:, 0].any()


def test_what_is_no_mean_is_left_as_it_is():
    statistic = Statistic("x", np.ones((3, 2)), lambda sums: sums[..., 0])
    assert standardised(statistic) == (statistic, Scale())


def test_a_margin_may_be_infinitely_many_tiny_scores_away():
    assert Scale(exponent=-1073).there(0.5) == np.inf
