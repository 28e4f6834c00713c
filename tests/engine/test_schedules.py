"""Random schedules: whatever joins, leaves, is cancelled, thrown out or swapped, every answer is the one that `generate`
gives under the version with which it began."""

import pytest

from tests.engine.schedules import played

SEEDS = 24
"""`benchmarks/engine_schedules.py` plays 10,000."""


@pytest.mark.parametrize("part", range(4))
def test_any_schedule_gives_the_tokens_of_generate_and_leaves_nothing_behind(part):
    for seed in range(part, SEEDS, 4):
        played(seed)
