"""A step's rows in as few micro-batches as keep padding within its share, cut where it is least."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bem.training.batches import micro_batches


def padded(lengths, groups):
    return sum(len(g) * max(lengths[i] for i in g) for g in groups)


def test_rows_of_like_length_stand_together():
    groups = micro_batches([100, 10, 98, 12, 11], least=1, padding=0.1)
    assert groups == [[1, 4, 3], [2, 0]]  # 3 x 12 + 2 x 100 = 236 for 231 tokens


def test_one_is_enough_where_little_is_padded_or_any_padding_will_do():
    assert micro_batches([50, 48, 49], least=1, padding=0.1) == [[1, 2, 0]]
    assert micro_batches([500, 4, 9], least=1, padding=1.0) == [[1, 2, 0]]


def test_without_any_padding_each_length_stands_alone():
    assert micro_batches([5, 7, 5, 6], least=1, padding=0.0) == [[0, 2], [3], [1]]


def test_at_least_as_many_as_were_asked_for_and_as_there_are_rows_at_most():
    assert len(micro_batches([5, 5, 5, 5], least=2, padding=0.1)) == 2
    assert micro_batches([5, 6], least=8, padding=0.1) == [[0], [1]]
    assert micro_batches([], least=1, padding=0.1) == []


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=7),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.05, 0.1, 0.3, 1.0]),
)
def test_each_row_once_within_the_padding_and_no_cut_is_better(lengths, least, padding):
    groups = micro_batches(lengths, least, padding)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    size, k = padded(lengths, groups), len(groups)
    assert k >= min(least, len(lengths))
    assert size * (1 - padding) <= sum(lengths)
    order = sorted(lengths)
    best = min(
        sum((b - a) * order[b - 1] for a, b in zip((0, *cut), (*cut, len(order)), strict=True))
        for cut in combinations(range(1, len(order)), k - 1)
    )
    assert size == best
    if k > min(least, len(lengths)):  # one fewer would pad too much
        fewer = micro_batches(lengths, k - 1, padding=1.0)
        assert padded(lengths, fewer) * (1 - padding) > sum(lengths)


@pytest.mark.parametrize("n", [1, 200])
def test_many_rows_of_one_length_are_one_batch(n):
    assert micro_batches([7] * n, 1, 0.1) == [list(range(n))]
