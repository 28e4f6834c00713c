"""A hit is what the cache held, by its own length, and what was not computed again."""

import pytest

from bem.experiments.measuring.cache_use import CacheUse, Call, cache_use


@pytest.mark.parametrize(
    ("steps", "hits"),
    [
        # a prompt of 5 in a batch padded to 8, an answer of 3: decoding reads 5, 6, 7 earlier tokens
        ([(8, 1), (9, 1), (10, 1)], 5 + 6 + 7),
        ([(0, 9), (0, 10), (0, 11)], 0),  # no cache: each step hands in everything again
        (
            [(0, 1), (0, 1), (0, 1)],
            0,
        ),  # an empty cache at every step, though one token is handed in
        ([(3, 1), (3, 1), (3, 1)], 0),  # nothing but padding in it
        ([(8, 1), (5, 5), (10, 1)], 5 + 2 + 7),  # four tokens computed again in the second step
        ([(6, 1), (6, 1), (6, 1)], 3 + 3 + 3),  # a cache that lost its newest columns
    ],
)
def test_hits_are_counted_from_the_cache_s_own_length(steps, hits):
    calls = [Call(0, 8), *(Call(*step) for step in steps)]
    assert cache_use(calls, prompt=5, answer=3) == CacheUse(hits, 18)


def test_an_empty_answer_needs_nothing():
    assert cache_use([Call(0, 8)], prompt=5, answer=0) == CacheUse(0, 0)
