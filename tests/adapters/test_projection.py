import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bem.adapters.projection import GramCache, SpectralMonitor, controlled_norm, gram, into_ball


def factors(seed, d_out, d_in, rank):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return draw(d_out, rank), draw(rank, d_in), draw(3, rank)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 20), st.integers(1, 12))
def test_the_gram_norm_is_the_dense_norm(seed, d_out, d_in, rank):
    u, v, controls = factors(seed, d_out, d_in, rank)
    for c, norm in zip(controls, controlled_norm(gram(u, v), controls), strict=True):
        dense = torch.linalg.matrix_norm(u @ torch.diag(c) @ v)
        assert torch.allclose(norm, dense, rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0.01, 100))
def test_no_composed_update_leaves_the_ball(seed, rank, radius):
    u, v, controls = factors(seed, 15, 11, rank)
    for before, c in zip(controls, into_ball(gram(u, v), controls, radius), strict=True):
        dense = float(torch.linalg.matrix_norm(u @ torch.diag(before) @ v))
        norm = float(torch.linalg.matrix_norm(u @ torch.diag(c) @ v))
        assert norm <= radius * (1 + 1e-3)
        if dense < radius * 0.99:
            assert torch.equal(c, before)  # inside: untouched
        if dense > radius * 1.01:
            assert norm == pytest.approx(
                radius, rel=1e-3
            )  # outside: onto the surface, same direction


def test_a_radius_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="radius must be > 0, got 0"):
        into_ball(torch.eye(2), torch.ones(2), 0.0)


def test_the_spectral_monitor_sees_what_svd_sees():
    u, v, controls = factors(0, 17, 13, 5)
    for c in controls:
        values = torch.linalg.svdvals((u @ torch.diag(c) @ v).double())
        found = SpectralMonitor(u, v).spectrum(c)
        assert found.sigma == pytest.approx(float(values[0]), rel=1e-5)
        assert found.frobenius == pytest.approx(float(values.square().sum().sqrt()), rel=1e-5)


def test_the_spectral_monitor_refuses_a_diverged_control():
    u, v, _ = factors(0, 4, 4, 2)
    with pytest.raises(ValueError, match="1 non-finite"):
        SpectralMonitor(u, v).spectrum(torch.tensor([1.0, float("nan")]))


def test_a_kept_gram_matrix_follows_the_weights():
    u, v, _ = factors(0, 6, 5, 3)
    kept = GramCache()
    with torch.no_grad():
        first = kept(u, v)
        assert kept(u, v) is first
        u.mul_(2.0)
        assert torch.allclose(kept(u, v), gram(u, v)) and not torch.allclose(kept(u, v), first)
