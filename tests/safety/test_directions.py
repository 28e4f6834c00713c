"""Directions are those in which two kinds of states differ; hand-made states whose answer is known."""

import pytest
import torch

from bem.errors import SafetyError
from bem.safety.directions import clusters, contrast_directions, coordinates, shrunk_covariance


def states(n, shift, seed, d=24):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x[:, : len(shift)] += torch.tensor(shift)
    return x


def test_the_first_direction_is_the_difference_of_means_and_all_are_orthonormal():
    bad, good = states(400, [3.0], 0), states(400, [], 1)
    u = contrast_directions(bad, good, [i % 4 for i in range(400)], most=4)
    assert u.shape == (24, 4)
    assert torch.allclose(u.T @ u, torch.eye(4, dtype=torch.float64), atol=1e-9)
    assert float(u[0, 0]) > 0.95


def test_categories_that_lie_apart_get_directions_of_their_own():
    bad = torch.cat([states(200, [3.0, 3.0], 0), states(200, [3.0, -3.0], 2)])
    u = contrast_directions(bad, states(400, [], 1), [0] * 200 + [1] * 200, most=2)
    found = torch.linalg.svdvals(u[:2])  # the plane of the two shifts
    assert float(found.min()) > 0.9


def test_harmful_states_lie_higher_along_every_direction():
    bad, good = states(100, [1.0, -2.0], 0), states(100, [], 1)
    u = contrast_directions(bad, good, clusters(bad, 3), most=3)
    assert ((coordinates(bad, u)[0].mean(0) - coordinates(good, u)[0].mean(0)) > -0.1).all()


def test_coordinates_are_in_units_of_the_rest():
    h = torch.tensor([[3.0, 4.0, 0.0, 0.0]], dtype=torch.float64)
    u = torch.eye(4, dtype=torch.float64)[:, :1]
    c, r = coordinates(h, u)
    assert float(r) == pytest.approx(2.0) and float(c) == pytest.approx(1.5)  # sqrt(16 / 4)


def test_shrinkage_is_scikit_learns():
    covariance = pytest.importorskip("sklearn.covariance")
    x = states(30, [2.0], 3)
    assert torch.allclose(shrunk_covariance(x), torch.tensor(covariance.OAS().fit(x.numpy()).covariance_))  # fmt: skip


def test_clusters_are_those_that_lie_apart_and_the_same_for_one_seed():
    x = torch.cat([states(20, [9.0], 0), states(20, [-9.0], 1)])
    of = clusters(x, 2)
    assert of == clusters(x, 2) and len(set(of[:20])) == len(set(of[20:])) == 1 and of[0] != of[20]


def test_too_few_or_infinite_states_are_refused():
    with pytest.raises(SafetyError, match="eight prompts"):
        contrast_directions(states(3, [], 0), states(30, [], 1), [0] * 3)
    broken = states(30, [], 0)
    broken[0, 0] = float("nan")
    with pytest.raises(SafetyError, match="not finite"):
        contrast_directions(broken, states(30, [], 1), [0] * 30)
