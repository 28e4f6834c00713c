import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bem.evidence.fusion import best, reciprocal_rank


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 12))
def test_best_is_the_head_of_a_stable_sort(values, k):
    scores = np.array(values, np.float32)
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert best(scores, k) == expected[:k]
    assert best(scores, k, above=0.0) == [i for i in expected if values[i] > 0][:k]


def test_reciprocal_rank_by_hand():
    fused = reciprocal_rank([[7, 3], [3, 5]], k=60)
    assert [item for item, _ in fused] == [3, 7, 5]
    assert fused[0][1] == pytest.approx(1 / 62 + 1 / 61)
    assert fused[1][1] == pytest.approx(1 / 61)
    assert fused[2][1] == pytest.approx(1 / 62)


def test_one_ranking_keeps_its_order_and_ties_go_to_the_smaller_position():
    assert [i for i, _ in reciprocal_rank([[4, 2, 9], []])] == [4, 2, 9]
    assert [i for i, _ in reciprocal_rank([[8], [2]])] == [2, 8]
