import numpy as np
import pytest

from bem.errors import DataError
from bem.stats.inputs import cluster_codes, finite, over_seeds, sum_by_cluster


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
