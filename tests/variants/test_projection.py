import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bem.variants.projection import (
    SETS_KEPT,
    SLACK,
    GramCache,
    NormCache,
    SpectralMonitor,
    controlled_norm,
    gram,
    into_ball,
    scale_into_ball,
)


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


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10_000),
    st.integers(1, 15),
    st.integers(1, 15),
    st.integers(1, 20),
    st.sampled_from(["frobenius", "spectral"]),
)
def test_the_bound_is_the_dense_norm_of_the_chosen_ranks_and_never_below(
    seed, d_out, d_in, rank, kind
):
    u, v, controls = factors(seed, d_out, d_in, rank)
    columns = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))[: rank // 2 + 1]
    c = controls[:, columns].double()
    bounds = NormCache().bound(u, v, columns, "half", c, kind)
    order = "fro" if kind == "frobenius" else 2
    for row, bound in zip(c, bounds, strict=True):
        dense = u[:, columns].double() * row @ v[columns].double()
        norm = torch.linalg.matrix_norm(dense, ord=order)
        own = u[:, columns].norm(dim=0) * v[columns].norm(dim=1)
        assert norm <= bound <= norm * (1 + 1e-9) + 1.1 * SLACK * float(row.abs() @ own.double())


def test_the_norms_of_a_set_are_kept_until_a_weight_changes():
    u, v, controls = factors(0, 6, 5, 3)
    kept, columns = NormCache(), torch.arange(3)
    c = controls.double()
    first = kept._factors_of(u, v, columns, "all", "frobenius")
    assert kept._factors_of(u, v, columns, "all", "frobenius") is first
    assert kept._factors_of(u, v, columns, "all", "spectral") is not first
    before = kept.bound(u, v, columns, "all", c, "frobenius")
    u.mul_(2.0)
    assert torch.allclose(kept.bound(u, v, columns, "all", c, "frobenius"), 2 * before)
    for name in range(3 * SETS_KEPT):  # it does not grow without end
        kept.bound(u, v, columns, name, c, "frobenius")
    assert len(kept._factors) == SETS_KEPT


@pytest.mark.parametrize(
    ("bound", "scale"),
    [
        (0.0, 1.0),  # nothing there: nothing to scale
        (0.5, 1.0),  # inside: untouched
        (1.0, 1023 / 1024),  # on the surface: the next step down, whatever the last bit of the norm
        (1.6, 639 / 1024),  # 0.625 is a step itself
        (1.5, 682 / 1024),  # 0.6667 = 682.67 steps
    ],
)
def test_scales_are_rounded_down_to_ten_bits(bound, scale):
    assert float(scale_into_ball(torch.tensor(bound, dtype=torch.float64), 1.0)) == scale


def test_far_outside_the_ball_rounding_costs_less_than_a_500th():
    bounds = torch.logspace(0, 30, 999, dtype=torch.float64)
    norms = bounds * scale_into_ball(bounds, 1.0)
    assert norms.max() <= 1.0 and norms.min() > 1 - 1 / 500


def test_the_last_bit_of_a_norm_does_not_change_the_scale():
    for norm in (1.0, 1.25, 2.0, 4.0, 1.6):
        near = torch.tensor([norm * (1 - 1e-14), norm, norm * (1 + 1e-14)], dtype=torch.float64)
        assert len(set(scale_into_ball(near, 1.0).tolist())) == 1
