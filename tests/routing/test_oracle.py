import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bem.routing.oracle import best_path


def cost_of(path, losses, switch_cost):
    changes = sum(a != b for a, b in itertools.pairwise(path))
    return sum(losses[t][e] for t, e in enumerate(path)) + switch_cost * changes


def brute_force(losses, switch_cost, allowed, first=None):
    """Least cost over every path, optionally with the first expert given."""
    chunks, experts = np.shape(losses)
    paths = [
        p
        for p in itertools.product(range(experts), repeat=chunks)
        if all(allowed[t][e] for t, e in enumerate(p)) and first in (None, p[0])
    ]
    return min((cost_of(p, losses, switch_cost) for p in paths), default=np.inf)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    st.booleans(),
)
def test_path_and_cost_to_go_equal_brute_force(seed, chunks, experts, switch_cost, coarse):
    rng = np.random.default_rng(seed)
    losses = rng.integers(0, 3, (chunks, experts)) if coarse else rng.normal(size=(chunks, experts))
    allowed = rng.random((chunks, experts)) < 0.7
    allowed[np.arange(chunks), rng.integers(0, experts, chunks)] = True
    found = best_path(losses, switch_cost, allowed=allowed)
    assert found.cost == pytest.approx(brute_force(losses, switch_cost, allowed))
    assert found.cost == pytest.approx(cost_of(found.path, losses, switch_cost))
    assert allowed[np.arange(chunks), found.path].all()
    for t, e in itertools.product(range(chunks), range(experts)):
        expected = brute_force(losses[t:], switch_cost, allowed[t:], first=e)
        assert found.cost_to_go[t, e] == pytest.approx(expected)


def test_hand_computed_example():
    losses = [[0, 2], [1, 0], [1, 0]]
    assert best_path(losses, 0.5).path.tolist() == [0, 1, 1]  # 0.5; staying with 0 costs 2
    assert best_path(losses, 3.0).path.tolist() == [0, 0, 0]  # 2 either way: the first expert
    assert best_path(losses, 0.5).cost_to_go.tolist() == [[0.5, 2], [1.5, 0], [1, 0]]


def test_without_loss_for_anyone_it_switches_as_late_as_possible():
    losses = [[0, 4], [0.1, 0.1], [0.7, 0.7], [0.2, 0.2], [4, 0]]
    assert best_path(losses, 1.0).path.tolist() == [0, 0, 0, 0, 1]


def test_equally_cheap_experts_do_not_make_it_leave_the_active_one():
    assert best_path([[1, 0], [0, 0], [0, 0]], 0.0).path.tolist() == [1, 1, 1]
    assert best_path([[0, 1], [1, 0]], 1.0).path.tolist() == [0, 0]  # switching costs 1 too


def test_a_fixed_chunk_is_governed_by_its_expert():
    losses = [[0, 5], [5, 0], [5, 0]]
    found = best_path(losses, 1.0, fixed=[-1, 0, -1])
    assert found.path.tolist() == [0, 0, 1]
    assert found.cost == 6
    assert found.cost_to_go[1].tolist() == [6, np.inf]


def test_a_batch_equals_its_sequences_one_by_one_and_padding_costs_nothing():
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(2, 3, 6, 4))
    lengths = rng.integers(1, 7, (2, 3))
    real = np.arange(6) < lengths[..., None]
    together = best_path(losses, 0.4, real=real)
    for i, j in itertools.product(range(2), range(3)):
        n = lengths[i, j]
        alone = best_path(losses[i, j, :n], 0.4)
        assert together.path[i, j, :n].tolist() == alone.path.tolist()
        assert (together.path[i, j, n:] == alone.path[-1]).all()  # padding: no change
        assert together.cost[i, j] == pytest.approx(alone.cost)
        assert together.cost_to_go[i, j, :n] == pytest.approx(alone.cost_to_go)
        assert (together.cost_to_go[i, j, n:] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [[0.0, np.nan]]}, "1 losses are not finite"),
        ({"losses": [0.0, 1.0]}, r"got \(2,\)"),
        ({"switch_cost": -1.0}, "switch_cost must be finite and >= 0, got -1.0"),
        ({"fixed": [2]}, "there are 2"),
        ({"allowed": [[False, False]]}, r"no expert may govern chunk \(0,\)"),
        ({"allowed": [[True, False]], "fixed": [1]}, "exclude all"),
    ],
)
def test_what_cannot_be_answered_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        best_path(**{"losses": [[0.0, 1.0]], "switch_cost": 1.0, **changes})
