"""What is composed equals the dense sum of experts, and never leaves the trust region."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bem.adapters.lora import Update
from bem.errors import AttachError
from bem.experts.compose import Decision, TrustRegion, most_important
from bem.experts.stack import ExpertStack

NORMS = {"frobenius": "fro", "spectral": 2}


def stack_of(ranks, d_in=11, d_out=13, seed=0, degenerate=0.0):
    """A stack of random experts; degenerate: how close all of them are to the same directions."""
    generator = torch.Generator().manual_seed(seed)
    stack = ExpertStack(d_in, d_out, ranks)
    same_u, same_v = (
        torch.randn(d_out, 1, generator=generator),
        torch.randn(1, d_in, generator=generator),
    )
    for expert, rank in enumerate(ranks):
        u = torch.randn(d_out, rank, generator=generator)
        v = torch.randn(rank, d_in, generator=generator)
        keep = 1.0 - degenerate
        stack.fill(expert, Update(keep * u + degenerate * same_u, keep * v + degenerate * same_v))
    return stack


def decide(gates, ranks=99, strength=1.0):
    gates = torch.as_tensor(gates, dtype=torch.float32)
    lead = gates.shape[:-1]
    return Decision(gates, torch.full(lead, ranks), torch.full(lead, strength))


def dense(stack, control, dtype=torch.float32):
    """U diag(c) V as it is applied, formed in float64."""
    packed = stack.at(dtype)
    c = control.detach().to(dtype).double()
    return packed.u.detach().double() * c @ packed.v.detach().double()


def norm(stack, control, kind, dtype=torch.float32):
    return float(torch.linalg.matrix_norm(dense(stack, control, dtype), ord=NORMS[kind]))


gates_of_three = st.lists(
    st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.3, 1e-6, 1e4, 1e20]), min_size=3, max_size=3
)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 1000),
    st.lists(gates_of_three, min_size=1, max_size=4),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    st.floats(1e-3, 1e3),
    st.sampled_from(sorted(NORMS)),
    st.booleans(),
    st.sampled_from([0.0, 1.0 - 1e-7, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(0, [[1e20, -1e20, 0.0]], 12, 1.0, 1e-3, "frobenius", False, 1.0, torch.float32)
def test_no_composed_update_is_larger_than_tau(
    seed, gates, ranks, strength, radius, kind, relative, degenerate, dtype
):
    stack = stack_of([3, 1, 5], seed=seed, degenerate=degenerate)
    region = TrustRegion(radius, kind, relative)
    stack.mount(region, 2.5, None)
    tau = radius * (2.5 if relative else 1.0)
    decision = decide(gates, ranks, strength)
    free, held = (stack.compose(decision, r, dtype) for r in (None, region))
    for before, after in zip(free, held, strict=True):
        assert norm(stack, after, kind, dtype) <= tau
        slack = 0.9 if dtype == torch.bfloat16 else 0.99
        if norm(stack, before, kind, dtype) < tau * slack and before.abs().max() < 10:
            assert torch.equal(after, before)  # inside: untouched


@pytest.mark.parametrize("kind", sorted(NORMS))
def test_what_is_outside_lands_on_the_surface_in_the_same_direction(kind):
    stack = stack_of([4, 4])
    decision = decide([[1.0, 0.5], [2.0, -1.0]])
    free, held = stack.compose(decision, None), stack.compose(decision, TrustRegion(1.5, kind))
    for before, after in zip(free, held, strict=True):
        assert 1.5 * (1 - 1 / 500) < norm(stack, after, kind) <= 1.5
        assert torch.allclose(after / after.norm(), before / before.norm(), atol=1e-6)


@pytest.mark.parametrize("kind", sorted(NORMS))
def test_experts_that_nearly_cancel_stay_inside_though_their_gates_are_rounded(kind):
    stack = stack_of([2, 2])
    one = stack.update_of(0)
    stack.put(1, Update(3 * one.u, one.v))
    gates = torch.linspace(1.0, 2.0, 50)[:, None] * torch.tensor([[1e4, -1e4 / 3]])
    for radius in (1e-4, 1e-3, 1e-2):  # of the size of what rounding leaves of the difference
        for row in stack.compose(decide(gates), TrustRegion(radius, kind)):
            assert norm(stack, row, kind) <= radius


def test_a_huge_update_is_shrunk_and_not_dropped():
    stack = stack_of([3])
    for kind in NORMS:
        control = stack.compose(decide([1e20]), TrustRegion(1.0, kind))
        assert 0.99 < norm(stack, control, kind) <= 1.0


def test_the_scale_is_a_multiple_of_one_1024th():
    stack = stack_of([4])
    whole = norm(stack, torch.ones(4), "frobenius")
    for fraction in (0.999, 0.8, 0.51):
        control = stack.compose(decide([1.0]), TrustRegion(whole * fraction))
        scale = float(control[0]) * 1024
        assert scale == int(scale) and fraction * 1024 - 1 <= scale <= fraction * 1024


@pytest.mark.parametrize("region", [None, TrustRegion(0.7), TrustRegion(0.7, "spectral")])
def test_equal_decisions_give_bitwise_equal_controls_whoever_else_is_in_the_batch(region):
    stack = stack_of([4, 2, 5])
    generator = torch.Generator().manual_seed(1)
    gates = torch.randn(64, 3, generator=generator) * (torch.rand(64, 3, generator=generator) > 0.4)
    ranks = torch.randint(0, 12, (64,), generator=generator)
    together = stack.compose(Decision(gates, ranks, torch.ones(64)), region)
    for row in range(64):
        alone = stack.compose(Decision(gates[row], ranks[row], torch.tensor(1.0)), region)
        assert torch.equal(alone, together[row])


def test_a_rank_budget_keeps_the_best_approximation_of_an_expert():
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(13, 6, generator=generator), torch.randn(6, 11, generator=generator)
    stack = ExpertStack(11, 13, [2, 6])
    stack.fill(1, Update(u, v))
    left, values, right = torch.linalg.svd(u.double() @ v.double())
    for k in range(8):  # Eckart-Young: the truncated SVD
        best = (left[:, :k] * values[:k]) @ right[:k] if k < 7 else u.double() @ v.double()
        found = dense(stack, stack.compose(decide([0.0, 1.0], ranks=k), None))
        assert torch.allclose(found, best, atol=1e-5)


def test_a_rank_budget_weighs_importance_by_the_gate():
    stack = ExpertStack(4, 4, [2, 2])
    stack.fill(
        0, Update(torch.eye(4)[:, :2], torch.diag(torch.tensor([4.0, 1.0])) @ torch.eye(4)[:2])
    )
    stack.fill(
        1, Update(torch.eye(4)[:, 2:], torch.diag(torch.tensor([3.0, 2.0])) @ torch.eye(4)[2:])
    )
    assert stack.at(torch.float32).importance.tolist() == [4.0, 1.0, 3.0, 2.0]
    equal = stack.compose(decide([1.0, 1.0], ranks=2), None)
    assert equal.tolist() == [1.0, 0.0, 1.0, 0.0]
    second = stack.compose(decide([0.4, -1.0], ranks=2, strength=0.5), None)  # 1.6, 0.4, 3, 2
    assert second.tolist() == [0.0, 0.0, -0.5, -0.5]


def test_of_equally_important_ranks_the_first_is_kept():
    score = torch.tensor([[1.0, 2.0, 2.0, 1.0]])
    kept = most_important(score, torch.tensor([[3]]))
    assert kept.tolist() == [[True, True, True, False]]
    assert most_important(score, torch.tensor([[1]])).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("gates", [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
def test_no_gate_no_rank_and_no_strength_is_no_update(gates):
    stack = stack_of([2, 0, 3])  # the second expert does not touch this site
    assert stack.compose(decide(gates), TrustRegion(1.0)).tolist() == [0.0] * 5
    assert stack.compose(decide([1.0, 1.0, -1.0], ranks=0), None).tolist() == [0.0] * 5
    control = stack.compose(decide([1.0, 1.0, -1.0], strength=0.0), TrustRegion(1.0))
    assert control.tolist() == [0.0] * 5
    assert not torch.signbit(control).any()  # equal controls are equal bits


def test_controls_keep_the_shape_of_the_chunks():
    stack = stack_of([2, 3])
    assert stack.compose(decide(torch.ones(4, 6, 2)), TrustRegion(1.0)).shape == (4, 6, 5)
    assert stack.compose(decide(torch.ones(0, 6, 2)), TrustRegion(1.0)).shape == (0, 6, 5)


def test_the_norms_follow_the_weights():
    stack = stack_of([3, 3])
    region, decision = TrustRegion(1.0), decide([1.0, 1.0])
    stack.compose(decision, region)
    with torch.no_grad():
        for u in stack.u.values():
            u.mul_(7.0)
    assert norm(stack, stack.compose(decision, region), "frobenius") <= 1.0
    stack.fill(0, Update(torch.full((13, 3), 50.0), torch.ones(3, 11)))
    assert norm(stack, stack.compose(decision, region), "frobenius") <= 1.0
    for u in stack.u.values():
        u.data = 3 * u.data
    assert norm(stack, stack.compose(decision, region), "frobenius") <= 1.0
    stack.half().float()  # other values, perhaps at the old address
    assert norm(stack, stack.compose(decision, region), "frobenius") <= 1.0


def test_gates_and_strength_have_gradients_and_the_scale_is_a_constant():
    stack = stack_of([3, 2])
    gates = torch.tensor([[1.0, 2.0]], requires_grad=True)
    strength = torch.tensor([0.5], requires_grad=True)
    stack.compose(Decision(gates, torch.tensor([9]), strength), None).sum().backward()
    assert gates.grad.tolist() == [[1.5, 1.0]]  # ranks * strength
    assert strength.grad.tolist() == [7.0]  # 3 * 1 + 2 * 2


def test_a_relative_region_needs_the_norm_of_the_weight():
    stack = stack_of([2])
    with pytest.raises(AttachError, match="needs the frozen weight's norm, got None"):
        stack.compose(decide([1.0]), TrustRegion(0.1, relative=True))
    weight = torch.diag(torch.tensor([3.0, 4.0]))
    assert TrustRegion(1.0).norm_of(weight) == 5.0
    assert TrustRegion(1.0, "spectral").norm_of(weight) == pytest.approx(4.0)


def test_impossible_decisions_and_regions_are_refused():
    stack = stack_of([2, 2])
    with pytest.raises(AttachError, match="3 gates for 2 experts"):
        stack.compose(decide([1.0, 1.0, 1.0]), None)
    with pytest.raises(AttachError, match="a decision needs gates"):
        Decision(torch.ones(2, 3), torch.ones(3), torch.ones(2))
    with pytest.raises(AttachError, match="radius must be > 0, got 0"):
        TrustRegion(0.0)
    with pytest.raises(AttachError, match="unknown norm 'nuclear'"):
        TrustRegion(1.0, "nuclear")


@pytest.mark.parametrize("region", [None, TrustRegion(1.0), TrustRegion(1.0, "spectral")])
def test_what_is_not_finite_stays_visible_in_its_chunk_alone(region):
    stack = stack_of([2, 2])
    for bad in (float("nan"), float("inf")):
        control = stack.compose(decide([[1.0, bad], [1.0, 1.0]]), region)
        assert not control[0].isfinite().all() and control[1].isfinite().all()
    control = stack.compose(decide([1.0, 1.0], strength=float("nan")), region)
    assert not control.isfinite().any()


@pytest.mark.parametrize("most", [1, 2, 3, 5, None])
@pytest.mark.parametrize("region", [None, TrustRegion(0.7), TrustRegion(0.7, "spectral")])
def test_composing_the_gated_experts_alone_is_composing_all(most, region):
    stack = stack_of([4, 2, 0, 5, 1])
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(32, 5, generator=generator).argsort(-1)
    gates = torch.randn(32, 5, generator=generator) * (order < (most or 5))
    ranks = torch.randint(0, 9, (32,), generator=generator)
    everyone = Decision(gates, ranks, torch.ones(32))
    few = Decision(gates, ranks, torch.ones(32), most)
    torch.testing.assert_close(
        stack.compose(few, region), stack.compose(everyone, region), rtol=3e-3, atol=0
    )
    assert torch.equal(stack.compose(few, None), stack.compose(everyone, None))


@pytest.mark.parametrize("most", [2, None])
def test_64_experts_of_64_ranks_compose_within_the_region(most):
    stack = ExpertStack(80, 96, [64] * 64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for u in stack.u.values():
            u.normal_(generator=generator)
    gates = torch.zeros(3, 64)
    gates[0, 7], gates[1, [3, 60]], gates[2, 63] = 1.0, 0.5, -2.0
    decision = Decision(gates, torch.full((3,), 32), torch.ones(3), most)
    for kind in NORMS if most else ["frobenius"]:
        control = stack.compose(decision, TrustRegion(1.0, kind))
        assert control.count_nonzero(-1).tolist() == [32, 32, 32]
        for row in control:
            assert 0.99 < norm(stack, row, kind) <= 1.0


def test_a_stack_without_ranks_composes_nothing():
    stack = ExpertStack(3, 4, [0, 0])
    control = stack.compose(decide([[1.0, 1.0]]), TrustRegion(1.0))
    assert control.shape == (1, 0)
