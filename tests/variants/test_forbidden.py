"""Writers stay out of forbidden directions, whatever they held before; what is allowed stays as it was."""

import pytest
import torch

from bem.errors import AttachError
from bem.variants.forbidden import Forbidden


def basis(d=16, s=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, s, generator=generator, dtype=torch.float64)).Q


def test_a_factor_loses_what_points_into_the_basis_and_nothing_else():
    forbidden = Forbidden(torch.eye(4)[:, :1])
    u = torch.tensor([[3.0, 1.0], [4.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    assert forbidden.leak(u) == pytest.approx((10 / 30) ** 0.5)
    forbidden.keep_out(u)
    assert torch.equal(u, torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))


def test_projecting_twice_keeps_every_bit():
    forbidden, u = Forbidden(basis()), torch.randn(16, 5)
    forbidden.keep_out(u)
    once = u.clone()
    forbidden.keep_out(u)
    assert torch.equal(u, once) and forbidden.leak(u) < 1e-6


def test_what_is_added_leaves_the_basis_out():
    forbidden, delta = Forbidden(basis()), torch.randn(7, 16)
    out = forbidden.without(delta)
    assert (out.double() @ basis()).abs().max() < 1e-6
    expected = delta.double() @ (torch.eye(16, dtype=torch.float64) - basis() @ basis().T)
    assert torch.allclose(out.double(), expected, atol=1e-6)


def test_reserved_directions_keep_what_is_free_of_the_basis():
    forbidden, reserved = Forbidden(basis(s=2)), basis(s=6, seed=1)
    inside = forbidden.inside(reserved)
    assert inside.shape == (16, 4)
    assert torch.allclose(inside.T @ inside, torch.eye(4, dtype=torch.float64), atol=1e-9)
    assert (basis(s=2).T @ inside).abs().max() < 1e-9
    assert torch.allclose(reserved @ (reserved.T @ inside), inside)  # nothing from outside


def test_reserved_directions_that_are_all_forbidden_are_an_error():
    with pytest.raises(AttachError, match="wholly within"):
        Forbidden(basis(s=3)).inside(basis(s=3)[:, :2])


def test_a_basis_that_is_not_orthonormal_is_refused():
    with pytest.raises(AttachError, match="orthonormal only within"):
        Forbidden(torch.ones(4, 2))
    with pytest.raises(AttachError):
        Forbidden(torch.full((4, 1), float("nan")))
