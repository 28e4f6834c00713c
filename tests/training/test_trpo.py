import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bem.errors import Diverged
from bem.routing.distribution import HeadsDistribution
from bem.training.trpo import (
    Batch,
    TRPOOptimizer,
    conjugate_gradient,
    fisher_vector_product,
)

HEADS = (3, 2)


class SmallPolicy(nn.Module):
    """A tanh network with a head of three and a head of two options."""

    def __init__(self, seed=0, inputs=3, hidden=4, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh())
        self.heads = nn.Linear(hidden, sum(HEADS))
        self.to(dtype)

    def distribution(self, obs, masks):
        return HeadsDistribution(self.heads(self.body(obs)).split(HEADS, -1), masks)


def random_batch(policy, seed=0, rows=40):
    """Actions drawn by the policy under random masks, advantages at random."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(policy.parameters()).dtype
    obs = torch.randn(rows, 3, generator=generator, dtype=dtype)
    masks = tuple(torch.rand(rows, n, generator=generator) < 0.8 for n in HEADS)
    for mask in masks:
        mask[:, -1] = True
    with torch.no_grad():
        drawn = policy.distribution(obs, masks)
        actions = drawn.sample(generator)
        log_probs = drawn.log_prob(actions)
    advantages = torch.randn(rows, generator=generator, dtype=dtype)
    return Batch(obs, masks, actions, log_probs, advantages)


def bits(policy):
    return [p.detach().clone() for p in policy.parameters()]


def same_bits(policy, saved):
    return all(torch.equal(p, q) for p, q in zip(policy.parameters(), saved, strict=True))


def dense_fisher(policy, obs, masks):
    """mean_s sum_a pi(a|s) g g^T with g = grad log pi(a|s), every joint action enumerated."""
    parameters = list(policy.parameters())
    size = sum(p.numel() for p in parameters)
    fisher = torch.zeros(size, size, dtype=obs.dtype)
    for s in range(len(obs)):
        row, row_masks = obs[s : s + 1], tuple(m[s : s + 1] for m in masks)
        options = [m[0].nonzero()[:, 0].tolist() for m in row_masks]
        for action in itertools.product(*options):
            log_p = policy.distribution(row, row_masks).log_prob(torch.tensor([action]))[0]
            g = torch.cat([x.reshape(-1) for x in torch.autograd.grad(log_p, parameters)])
            fisher += log_p.detach().exp() * torch.outer(g, g) / len(obs)
    return fisher


def surrogate_gradient(policy, batch):
    advantages = batch.advantages - batch.advantages.mean()
    advantages = advantages / advantages.std(correction=0)
    ratio = (policy.distribution(batch.obs, batch.masks).log_prob(batch.actions)).exp()
    loss = (ratio / batch.log_probs.exp() * advantages).mean()
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(policy.parameters()))])


def test_the_fisher_vector_product_equals_the_dense_fisher():
    policy = SmallPolicy()
    batch = random_batch(policy, rows=12)
    dense = dense_fisher(policy, batch.obs, batch.masks)
    product = fisher_vector_product(policy, batch.obs, batch.masks, damping=0.3)
    columns = torch.stack([product(e) for e in torch.eye(len(dense), dtype=torch.float64)])
    assert torch.allclose(columns, dense + 0.3 * torch.eye(len(dense)), atol=1e-12)


def test_conjugate_gradient_solves_a_positive_definite_system():
    torch.manual_seed(0)
    root = torch.randn(8, 8, dtype=torch.float64)
    matrix, b = root @ root.T + torch.eye(8), torch.randn(8, dtype=torch.float64)
    x, residual = conjugate_gradient(lambda v: matrix @ v, b, 50, tolerance=1e-10)
    assert torch.allclose(x, torch.linalg.solve(matrix, b), atol=1e-8)
    assert residual == pytest.approx(float((matrix @ x - b).norm() / b.norm()), abs=1e-9)


def test_conjugate_gradient_stops_where_the_curvature_is_not_positive():
    b = torch.tensor([1.0, 1.0])
    x, residual = conjugate_gradient(lambda v: torch.tensor([1.0, -3.0]) * v, b, 10)
    assert x.tolist() == [0, 0] and residual == 1


def test_the_first_candidate_is_the_dense_natural_gradient_step():
    policy = SmallPolicy()
    batch = random_batch(policy, seed=1)
    gradient = surrogate_gradient(policy, batch)
    damped = dense_fisher(policy, batch.obs, batch.masks) + 0.1 * torch.eye(len(gradient))
    direction = torch.linalg.solve(damped, gradient)
    length = math.sqrt(2 * 0.01 / float(direction @ gradient))  # x^T F x = x^T g
    before = torch.cat([p.reshape(-1) for p in bits(policy)])
    result = TRPOOptimizer(policy, cg_iterations=60).step(batch)
    moved = torch.cat([p.reshape(-1) for p in bits(policy)]) - before
    assert result.accepted and result.reason == ""
    assert torch.allclose(moved, direction * length * 0.8**result.backtracks, atol=1e-5)
    assert result.step_norm == pytest.approx(float(moved.norm()))
    assert result.cg_residual < 1e-5


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10_000),
    st.sampled_from([1e-4, 0.01, 0.3]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_an_accepted_step_improves_and_its_exact_kl_is_within_delta(seed, delta, damping, dtype):
    policy = SmallPolicy(seed, dtype=dtype)
    batch = random_batch(policy, seed)
    old, saved = copy.deepcopy(policy), bits(policy)
    result = TRPOOptimizer(policy, delta=delta, damping=damping).step(batch)
    with torch.no_grad():
        new = policy.distribution(batch.obs, batch.masks)
        free = torch.stack([m.sum(-1) > 1 for m in batch.masks]).any(0)
        kl = float(old.distribution(batch.obs, batch.masks).kl(new)[free].mean())
    if result.accepted:
        assert result.kl <= delta and result.surrogate > 0
        assert kl == pytest.approx(result.kl, rel=1e-3, abs=1e-6)
        assert result.entropy == pytest.approx(float(new.entropy()[free].mean()), rel=1e-4)
    else:
        assert same_bits(policy, saved) and result.reason and result.kl == 0


class Uphill(torch.autograd.Function):
    """The identity with the sign of its gradient planted wrong."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        return -gradients[0]


class Planted(SmallPolicy):
    """`SmallPolicy` with a defect: a lying gradient, or logits that break away from the start."""

    def __init__(self, defect):
        super().__init__()
        self.defect, self.start = defect, bits(self)

    def distribution(self, obs, masks):
        logits = self.heads(self.body(obs))
        moved = not same_bits(self, self.start)
        if self.defect == "gradient":
            logits = Uphill.apply(logits)
        if self.defect == "nan" and moved:
            logits = logits * float("nan")
        if self.defect == "jump" and moved:
            logits = logits + torch.arange(5.0) * 3
        if self.defect == "raise" and moved:
            raise RuntimeError("cannot evaluate")
        return HeadsDistribution(logits.split(HEADS, -1), masks)


@pytest.mark.parametrize("defect", ["gradient", "nan", "jump"])
def test_a_planted_bad_step_is_refused_and_leaves_the_weights_bit_for_bit(defect):
    policy = Planted(defect)
    batch = random_batch(policy)
    result = TRPOOptimizer(policy).step(batch)
    assert not result.accepted
    assert "no candidate kept KL <= 0.01 and improved the surrogate" in result.reason
    assert same_bits(policy, policy.start)
    assert (result.kl, result.surrogate, result.step_norm, result.backtracks) == (0, 0, 0, 10)


def test_a_policy_that_raises_at_a_candidate_gets_its_weights_back():
    policy = Planted("raise")
    batch = random_batch(policy)
    with pytest.raises(RuntimeError, match="cannot evaluate"):
        TRPOOptimizer(policy).step(batch)
    assert same_bits(policy, policy.start)


def test_without_backtracking_a_step_beyond_delta_is_refused():
    refused = 0
    for seed in range(30):
        policy = SmallPolicy(seed)
        batch, saved = random_batch(policy, seed), bits(policy)
        result = TRPOOptimizer(policy, delta=0.5, damping=0.0, backtracks=0).step(batch)
        if not result.accepted:
            refused += 1
            assert same_bits(policy, saved)
    assert refused > 0


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_equal_advantages_teach_nothing(constant):
    policy = SmallPolicy(dtype=torch.float32)
    batch, saved = random_batch(policy), bits(policy)
    equal = Batch(
        batch.obs, batch.masks, batch.actions, batch.log_probs, torch.full((40,), constant)
    )
    result = TRPOOptimizer(policy).step(equal)
    assert not result.accepted and "the gradient is zero" in result.reason
    assert same_bits(policy, saved)


def test_rows_without_a_choice_change_nothing():
    policy = SmallPolicy()
    batch, twin = random_batch(policy), copy.deepcopy(policy)
    free = torch.stack([m.sum(-1) > 1 for m in batch.masks]).any(0)
    assert not free.all()
    kept, forced = batch.rows(free), batch.rows(~free)
    assert TRPOOptimizer(policy).step(batch) == TRPOOptimizer(twin).step(kept)
    assert same_bits(policy, bits(twin))
    assert TRPOOptimizer(policy).step(forced).reason == "no row leaves anything to choose"
    assert same_bits(policy, bits(twin))


class Arms(nn.Module):
    """A bandit's policy: one logit per arm, whatever the observation."""

    def __init__(self, arms):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(arms))

    def distribution(self, obs, masks):
        return HeadsDistribution([self.logits.expand(len(obs), -1)], masks)


def play(arms, pay, steps, possible=None):
    """Pull 256 arms per step at random rewards pay[arm] + noise; learn; return the policy."""
    policy, generator = Arms(arms), torch.Generator().manual_seed(0)
    optimizer = TRPOOptimizer(policy, damping=1e-3)
    mask = torch.tensor(possible or [True] * arms).expand(256, arms)
    obs = torch.ones(256, 1)
    results = []
    for _ in range(steps):
        with torch.no_grad():
            drawn = policy.distribution(obs, [mask])
            actions = drawn.sample(generator)
        reward = torch.tensor(pay)[actions[:, 0]] + torch.randn(256, generator=generator)
        batch = Batch(obs, (mask,), actions, drawn.log_prob(actions), reward)
        results.append(optimizer.step(batch))
    return policy.distribution(obs, [mask]).detach().probs[0][0], policy, results


def test_a_two_armed_bandit_is_solved_within_the_trust_region():
    probs, _, results = play(2, [0.0, 1.0], steps=25)
    assert probs[1] > 0.98
    assert all(r.kl <= 0.01 for r in results)


def test_a_masked_option_never_gets_probability_however_well_it_would_pay():
    probs, policy, _ = play(3, [0.0, 1.0, 99.0], steps=10, possible=[True, True, False])
    assert probs[2] == 0 and probs[1] > 0.7
    assert policy.logits[2] == 0  # and no gradient


def test_same_seed_same_weights():
    first, second = (play(2, [0.0, 1.0], steps=5)[1] for _ in range(2))
    assert same_bits(first, bits(second))
    assert not torch.equal(first.logits, torch.zeros(2))


@pytest.mark.parametrize("name", ["obs", "log_probs", "advantages"])
def test_a_batch_that_is_not_finite_is_an_error(name):
    policy = SmallPolicy()
    batch = random_batch(policy)
    getattr(batch, name)[3] = float("inf")
    with pytest.raises(Diverged, match=f"of {name} are not finite"):
        TRPOOptimizer(policy).step(batch)


def test_a_batch_whose_shapes_do_not_fit_is_an_error():
    policy = SmallPolicy()
    b = random_batch(policy)
    with pytest.raises(ValueError, match=r"40 rows of obs and 2 masks need .* \(39,\)"):
        TRPOOptimizer(policy).step(Batch(b.obs, b.masks, b.actions, b.log_probs, b.advantages[1:]))


@pytest.mark.parametrize(
    "options", [{"delta": 0.0}, {"shrink": 1.0}, {"cg_iterations": 0}, {"damping": -1.0}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="got"):
        TRPOOptimizer(SmallPolicy(), **options)
