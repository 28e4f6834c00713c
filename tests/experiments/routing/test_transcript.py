"""A plan is what a router does within one turn."""

import pytest

from bem.experiments.routing.transcript import plan_lengths
from bem.routing.explain import Explained


def chunk(expert: str, turn: bool = False, rank: int = 2) -> Explained:
    return Explained(1, 0, 64, turn, expert, rank, 1.0, 0, 0.0, "", {}, 0.0)


@pytest.mark.parametrize(
    ("chunks", "lengths"),
    [
        ([chunk("a")], [1]),
        ([chunk("a"), chunk("a"), chunk("b")], [2]),
        ([chunk("a"), chunk("a", rank=1), chunk("a")], [3]),
        ([chunk("a"), chunk("a", turn=True), chunk("b", turn=True), chunk("c")], [1, 1, 2]),
        ([chunk("a", turn=True), chunk("b")], [2]),
    ],
)
def test_the_length_of_a_plan_is_its_number_of_different_actions_in_a_row(chunks, lengths):
    assert plan_lengths(chunks) == lengths
