"""What is projected stays inside the ball as the model applies it: weights and control rounded."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bem.variants.projection import (
    Ball,
    NormCache,
    grams,
    into_ball,
    low_rank_norm,
    norm_bound,
    scale_into_ball,
)

ORDER = {"frobenius": "fro", "spectral": 2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
norms = st.sampled_from(sorted(ORDER))


def factors(seed, d_out, d_in, rank):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return draw(d_out, rank), draw(rank, d_in), draw(3, rank).double()


def dense_norm(u, v, c, kind, dtype=torch.float64):
    """Of the update as applied: everything rounded to `dtype`, the product formed in float64."""
    u, v, c = (t.to(dtype).double() for t in (u, v, c))
    return float(torch.linalg.matrix_norm(u * c @ v, ord=ORDER[kind]))


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 20), st.integers(0, 12), norms)
def test_the_bound_is_the_dense_norm_and_never_below(seed, d_out, d_in, rank, kind):
    u, v, controls = factors(seed, d_out, d_in, rank)
    bounds = norm_bound(grams(u, v, kind), controls, 0.0)
    for c, bound in zip(controls, bounds, strict=True):
        dense = dense_norm(u, v, c, kind)
        assert dense <= float(bound) <= dense * (1 + 1e-4) + 1e-6


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), norms)
def test_a_v_by_groups_has_the_norm_of_the_block_diagonal_one(seed, groups, ranks, part, kind):
    u, _, controls = factors(seed, 7, 1, groups * ranks)
    v = torch.randn(groups, ranks, part, generator=torch.Generator().manual_seed(seed))
    grouped = norm_bound(grams(u, v, kind), controls, 0.0)
    dense = norm_bound(grams(u, torch.block_diag(*v), kind), controls, 0.0)
    assert torch.allclose(grouped, dense, rtol=1e-6)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    rank=st.integers(1, 12),
    radius=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    kind=norms,
    dtype=st.sampled_from(DTYPES),
    near=st.sampled_from([0.0, 1e-2, 1e-4, 1e-7]),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)
@example(seed=0, rank=2, radius=1.0, kind="frobenius", dtype=torch.float32, near=1e-4, size=1e3)
@example(seed=0, rank=2, radius=1.0, kind="spectral", dtype=torch.bfloat16, near=1e-7, size=1e3)
def test_no_update_leaves_the_ball_as_it_is_applied_even_where_ranks_cancel(
    seed, rank, radius, kind, dtype, near, size
):
    u, v, controls = factors(seed, 15, 11, rank)
    # every second rank undoes the one before it but for `near` of itself
    u = torch.cat([u, -u + near * factors(seed + 1, 15, 11, rank)[0]], 1)
    v, controls = torch.cat([v, v]), size * torch.cat([controls, controls], 1)
    projected = into_ball(u, v, controls, radius, kind, dtype)
    for before, after in zip(controls, projected, strict=True):
        assert dense_norm(u, v, after, kind, dtype) <= radius
        scale = float(after.abs().max() / before.abs().max())
        assert 0 < scale <= 1 and torch.allclose(after, before * scale, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", sorted(ORDER))
def test_what_is_inside_stays_and_what_is_outside_lands_on_the_surface(kind):
    u, v, controls = factors(0, 15, 11, 5)
    for c in controls:
        size = dense_norm(u, v, c, kind)
        assert torch.equal(into_ball(u, v, c, size * 1.01, kind), c)
        after = into_ball(u, v, c, size / 7, kind)
        assert 1 - 1 / 500 < 7 * dense_norm(u, v, after, kind) / size <= 1


def test_a_subnormal_control_in_float16_is_still_inside():
    u, v = torch.full((4, 1), 200.0), torch.full((1, 4), 200.0)  # one rank of norm 160,000
    for radius in (0.01, 0.1, 1.0):  # controls of 6e-8 and more: float16 has steps of 6e-8 there
        after = into_ball(u, v, torch.ones(1, dtype=torch.float64), radius, dtype=torch.float16)
        assert dense_norm(u, v, after, "frobenius", torch.float16) <= radius


@pytest.mark.parametrize("kind", sorted(ORDER))
def test_the_scale_has_the_gradient_of_radius_by_norm(kind):
    u, v, controls = factors(0, 9, 7, 4)
    for radius in (0.5, 1e6):  # outside, and inside
        c = controls[:1].clone().requires_grad_()
        weights = torch.randn(1, 4, dtype=torch.float64)
        (into_ball(u, v, c, radius, kind) * weights).sum().backward()
        smooth = controls[:1].clone().requires_grad_()
        size = torch.linalg.matrix_norm((u * smooth[0]) @ v.double(), ord=ORDER[kind])
        (smooth * (radius / size).clamp(max=1.0) * weights).sum().backward()
        torch.testing.assert_close(c.grad, smooth.grad, rtol=1e-2, atol=1e-3)


def test_weights_that_train_have_a_gradient_through_the_scale():
    u, v, controls = factors(0, 9, 7, 4)
    u.requires_grad_()
    into_ball(u, v, controls, 0.5, cache=NormCache()).sum().backward()
    assert u.grad.abs().max() > 0


def test_a_radius_that_is_not_positive_is_refused():
    u, v, c = factors(0, 4, 4, 2)
    for radius in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"radius must be > 0, got {radius}"):
            into_ball(u, v, c, radius)
        with pytest.raises(ValueError, match="do not attach it"):
            Ball(radius)


@pytest.mark.parametrize("kind", sorted(ORDER))
def test_a_control_that_is_not_finite_stays_visible(kind):
    u, v, controls = factors(0, 4, 4, 2)
    controls[0, 0] = float("nan")
    after = into_ball(u, v, controls, 1.0, kind)
    assert after[0].isnan().all() and after[1:].isfinite().all()


def test_ranks_of_other_sets_do_not_count():
    u, v, controls = factors(0, 9, 7, 6)
    columns = torch.tensor([[4, 1], [0, 5], [2, 3]])
    for kind in ORDER:
        chosen = grams(u, v, kind).select(columns)
        bounds = norm_bound(chosen, controls.gather(1, columns), 0.0)
        for c, own, bound in zip(controls, columns, bounds, strict=True):
            dense = dense_norm(u[:, own], v[own], c[own], kind)
            assert float(bound) == pytest.approx(dense, rel=1e-4)


@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_it_works_in_inference_mode_and_follows_the_weights(made_in_inference_mode):
    with torch.inference_mode(made_in_inference_mode):
        u, v, controls = factors(0, 6, 5, 3)
    cache = NormCache()
    with torch.inference_mode():
        first = into_ball(u, v, controls, 0.5, cache=cache)
        assert torch.equal(into_ball(u, v, controls, 0.5, cache=cache), first)
    if made_in_inference_mode:
        with torch.inference_mode():
            u.mul_(2.0)
    else:
        u.mul_(2.0)
        c = controls.clone().requires_grad_()  # training goes on behind an evaluation
        into_ball(u, v, c, 0.5, cache=cache).sum().backward()
    with torch.inference_mode():
        for c in into_ball(u, v, controls, 0.5, cache=cache):
            assert dense_norm(u, v, c, "frobenius") <= 0.5


def test_gram_matrices_are_kept_until_a_weight_changes():
    u, v, _ = factors(0, 6, 5, 3)
    kept = NormCache()
    first = kept(u, v, torch.float32, "frobenius")
    assert kept(u, v, torch.float32, "frobenius") is first
    assert kept(u, v, torch.bfloat16, "frobenius") is not first
    u.mul_(2.0)
    assert torch.allclose(kept(u, v, torch.float32, "frobenius").sizes, 2 * first.sizes)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 1e-4, 1e-7]), st.sampled_from(DTYPES))
def test_the_norm_of_a_static_update_holds_for_its_rounded_factors(seed, near, dtype):
    u, v, _ = factors(seed, 9, 7, 3)
    u, v = torch.cat([u, -u + near * torch.randn(9, 3)], 1), torch.cat([v, v])
    norm = low_rank_norm(u, v, dtype)
    assert norm.dtype == torch.float64
    assert dense_norm(u, v, torch.ones(6), "frobenius", dtype) <= float(norm)
    assert dense_norm(u, v, torch.ones(6), "frobenius") <= float(norm)


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
    bounds = torch.logspace(0, 290, 999, dtype=torch.float64)
    norms = bounds * scale_into_ball(bounds, 1.0)
    assert norms.max() <= 1.0 and norms.min() > 1 - 1 / 500


def test_the_last_bit_of_a_norm_does_not_change_the_scale():
    for norm in (1.0, 1.25, 2.0, 4.0, 1.6):
        near = torch.tensor([norm * (1 - 1e-14), norm, norm * (1 + 1e-14)], dtype=torch.float64)
        assert len(set(scale_into_ball(near, 1.0).tolist())) == 1
