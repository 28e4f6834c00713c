from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from bem.errors import DataError
from bem.stats.inputs import (
    cluster_codes,
    difference,
    finite,
    labels,
    numbers,
    over_seeds,
    sum_by_cluster,
)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_with_its_index(bad):
    with pytest.raises(DataError, match=r"em\[2\] is"):
        finite("em", [0.0, 1.0, bad])
    with pytest.raises(DataError, match=r"em\[1, 0\] is"):
        finite("em", [[0.0, 1.0], [bad, 1.0]], 2)


@pytest.mark.parametrize("bad", [[], [[1.0, 2.0], [3.0]], ["a"], 3.0])
def test_empty_ragged_text_and_scalars_are_refused(bad):
    with pytest.raises(DataError, match="em"):
        finite("em", bad)


def test_seeds_are_averaged_within_an_example():
    assert over_seeds("em", [[1, 0, 0], [0, 0, 1]]).tolist() == [0.5, 0.0, 0.5]


def test_clusters_sum_their_examples():
    codes = cluster_codes(["a", "b", "a"], 3)
    assert sum_by_cluster(np.array([[1.0], [2.0], [3.0]]), codes).tolist() == [[4.0], [2.0]]


def test_one_example_per_cluster_is_no_clustering():
    assert cluster_codes(["x", "y"], 2) is None
    with pytest.raises(DataError, match="1 labels for 2"):
        cluster_codes(["x"], 2)


@pytest.mark.parametrize("values", [[True, False], [Decimal(1), Fraction(0)], pd.Series([1, 0]),
                                    np.array([1, 0], np.float16), np.ma.array([1, 0])])  # fmt: skip
def test_whatever_is_a_number_is_read(values):
    assert numbers("em", values).tolist() == [1.0, 0.0]


def test_none_is_nan():
    assert np.isnan(numbers("em", [None, 1.0])[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "0"], r"em must be numbers, got str\d+: 1, 0"),
        (np.array(["1", 0], dtype=object), "em must be numbers, found the text '1'"),
        ([1 + 2j], "em must be numbers, got complex128"),
        (np.array(["2024-01-01"], "M8[D]"), "em must be numbers, got datetime64"),
        ([10**400], "em must be numbers"),
        ([[1], [1, 2]], "em must be numbers in a rectangular array"),
        (pd.Series([1, pd.NA]), "em must be numbers"),
        (np.ma.array([1, 2], mask=[0, 1]), "em has 1 masked entries"),
        ([np.ma.array([1, 2], mask=[0, 1])], "em has 1 masked entries"),
        ({"a": 1}, "em must be numbers"),
    ],
)
def test_whatever_is_none_or_hides_one_is_refused(values, message):
    with pytest.raises(DataError, match=message):
        numbers("em", values)


def test_rounding_is_no_difference():
    thirds = np.array([0.1 + 0.2, 1e-300, 0.5])
    assert difference(thirds, np.array([0.3, 2e-300, 0.25])).tolist() == [0.0, -1e-300, 0.25]


def test_a_label_is_the_same_as_a_number_a_float_and_a_text():
    assert labels("ids", [7, 7.0, "7", np.int64(7), np.float32(7)]) == ("7",) * 5
    assert labels("ids", [" a ", 0.5, ("doc", 1)]) == (" a ", "0.5", "('doc', 1)")


@pytest.mark.parametrize("bad", [None, float("nan"), pd.NA, pd.NaT, np.ma.masked])
def test_a_missing_label_is_named_and_never_a_cluster_of_its_own(bad):
    with pytest.raises(DataError, match=r"clusters\[1\] is .*: every example needs one"):
        cluster_codes(["d1", bad, "d2"], 3)


@pytest.mark.parametrize("bad", ["abc", b"abc", 5])
def test_labels_are_a_list(bad):
    with pytest.raises(DataError, match="ids must be a list"):
        labels("ids", bad)
