import itertools

import pytest
import torch
from torch import nn

from bem.errors import DataError, Diverged
from bem.online.penalties import (
    Fisher,
    OnlineEwc,
    Strength,
    exact_fisher,
    proximal_step,
    sampled_fisher,
)
from bem.routing.action import ActionSpace
from bem.routing.distribution import HeadsDistribution
from bem.routing.policy import Actor, Observed

HEADS = (3, 2)


class SmallPolicy(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(3, 4)
        self.heads = nn.Linear(4, sum(HEADS))
        self.double()

    def distribution(self, obs, masks):
        return HeadsDistribution(self.heads(torch.tanh(self.body(obs))).split(HEADS, -1), masks)


def situations(n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    masks = [torch.ones(n, h, dtype=torch.bool) for h in HEADS]
    masks[0][0, 1] = False
    return obs, masks


def named(module):
    return dict(module.named_parameters())


def test_the_exact_fisher_is_the_sum_over_all_joint_actions():
    """By its definition: every row, every pair of options, one gradient of the joint log-probability."""
    policy = SmallPolicy()
    obs, masks = situations()
    expected = {name: torch.zeros_like(p) for name, p in named(policy).items()}
    for row in range(len(obs)):
        for action in itertools.product(*map(range, HEADS)):
            if not all(mask[row, a] for mask, a in zip(masks, action, strict=True)):
                continue
            d = policy.distribution(obs[row : row + 1], [m[row : row + 1] for m in masks])
            log_p = d.log_prob(torch.tensor([action]))[0]
            gradients = torch.autograd.grad(log_p, list(policy.parameters()))
            for (name, total), g in zip(expected.items(), gradients, strict=True):
                expected[name] = total + log_p.exp().detach() * g.square() / len(obs)
    fisher = exact_fisher(policy, obs, masks, rows_at_once=2)
    assert (fisher.estimator, fisher.rows) == ("exact_heads", 5)
    for name, diagonal in fisher.diagonal.items():
        torch.testing.assert_close(diagonal, expected[name])


def test_the_sampled_fisher_is_the_exact_one_on_average():
    policy = SmallPolicy()
    obs, masks = situations(200)
    exact = exact_fisher(policy, obs, masks)
    generator, total = torch.Generator().manual_seed(1), 0.0
    for _ in range(20):
        d = policy.distribution(obs, masks)
        drawn = d.log_prob(d.sample(generator))
        total += sampled_fisher(drawn, named(policy)).trace / 20
    assert total == pytest.approx(exact.trace, rel=0.05)


def test_the_square_of_the_mean_gradient_is_far_smaller():
    """The trap: what is squared must be each row's own gradient."""
    policy = SmallPolicy()
    obs, masks = situations(200)
    d = policy.distribution(obs, masks)
    log_p = d.log_prob(d.sample(torch.Generator().manual_seed(1)))
    mean = torch.autograd.grad(log_p.mean(), list(policy.parameters()), retain_graph=True)
    assert (
        sum(float(g.square().sum()) for g in mean)
        < 0.1 * sampled_fisher(log_p, named(policy)).trace
    )


def test_the_routers_own_actor_has_an_exact_fisher():
    observed = Observed(4, 8, ActionSpace(("none", "a", "b"), (1, 2), (2, 4), (0.5, 1.0)))
    actor = Actor(observed, hidden=6)
    obs = torch.randn(3, observed.width)
    masks = [torch.ones(3, n, dtype=torch.bool) for n in observed.space.sizes]
    fisher = exact_fisher(actor, obs, masks)
    assert fisher.diagonal.keys() == named(actor).keys() and fisher.trace > 0


def ewc_of(policy, values, strength=2.0, decay=0.5):
    ewc = OnlineEwc(Strength(strength, "exact_heads"), decay)
    diagonal = {n: torch.full_like(p, values) for n, p in named(policy).items()}
    ewc.accept(named(policy), Fisher("exact_heads", diagonal, 1))
    return ewc


def test_the_penalty_by_hand():
    """strength 2, F = 3, every weight .1 off: 2/2 * 3 * .01 each; 0 at the anchor; 0 before any."""
    policy = SmallPolicy()
    ewc = ewc_of(policy, 3.0)
    assert ewc.penalty(named(policy))[1] == {"ewc": 0.0}
    moved = {n: p.detach() + 0.1 for n, p in named(policy).items()}
    count = sum(p.numel() for p in policy.parameters())
    loss, metrics = ewc.penalty(moved)
    assert loss.item() == pytest.approx(0.03 * count) and metrics["ewc"] == loss.item()
    assert OnlineEwc(Strength(1.0, "sampled")).penalty(named(policy))[0].item() == 0.0


def test_the_old_fisher_fades_and_the_anchor_moves():
    policy = SmallPolicy()
    ewc = ewc_of(policy, 3.0, decay=0.5)
    with torch.no_grad():
        policy.body.weight += 1.0
    ewc.accept(
        named(policy),
        Fisher("exact_heads", {n: torch.ones_like(p) for n, p in named(policy).items()}, 1),
    )
    assert torch.all(ewc.fisher["body.weight"] == 0.5 * 3.0 + 1.0)
    assert torch.equal(ewc.anchor["body.weight"], policy.body.weight)


def test_a_strength_belongs_to_one_estimator():
    policy = SmallPolicy()
    ewc = OnlineEwc(Strength(0.1, "exact_heads"))
    sampled = Fisher("sampled", {n: torch.ones_like(p) for n, p in named(policy).items()}, 1)
    with pytest.raises(ValueError, match="is for the exact_heads Fisher, this one is sampled"):
        ewc.accept(named(policy), sampled)


def test_its_state_is_whole():
    policy = SmallPolicy()
    ewc = ewc_of(policy, 3.0)
    back = OnlineEwc.from_state(*ewc.state())
    assert back.strength == ewc.strength and back.decay == ewc.decay
    moved = {n: p.detach() + 0.1 for n, p in named(policy).items()}
    assert torch.equal(back.penalty(moved)[0], ewc.penalty(moved)[0])
    with pytest.raises(DataError):
        OnlineEwc.from_state({}, {})


def test_the_proximal_step_is_the_minimum_it_claims_to_be():
    policy, accepted = (
        SmallPolicy(),
        {n: p.detach() + 0.3 for n, p in named(SmallPolicy(1)).items()},
    )
    ewc, rate, pull = ewc_of(SmallPolicy(2), 3.0), 0.1, 0.7
    before = {n: p.detach().clone() for n, p in named(policy).items()}
    gradients = {n: torch.randn_like(p) for n, p in before.items()}
    length = proximal_step(named(policy), gradients, rate, accepted, pull, ewc)
    for n, w in named(policy).items():  # the slope of the objective is 0 there
        slope = gradients[n] + (w - before[n]) / rate
        slope = slope + 2.0 * ewc.fisher[n] * (w - ewc.anchor[n]) + pull * (w - accepted[n])
        assert slope.abs().max() < 1e-10
    moved = sum(float((w - before[n]).detach().square().sum()) for n, w in named(policy).items())
    assert length == pytest.approx(moved**0.5)


def test_without_penalties_it_is_a_plain_gradient_step():
    w = {"w": torch.tensor([1.0, 2.0])}
    proximal_step(w, {"w": torch.tensor([1.0, -1.0])}, 0.5, {"w": torch.zeros(2)}, 0.0)
    assert torch.equal(w["w"], torch.tensor([0.5, 2.5]))


def test_it_is_stable_where_an_explicit_step_diverges():
    """rate * strength * F = 600: one step lands next to the anchor, a hundred stay there."""
    policy = SmallPolicy()
    ewc = ewc_of(SmallPolicy(1), 3.0, strength=2000.0)
    zero = {n: torch.zeros_like(p) for n, p in named(policy).items()}
    for _ in range(100):
        proximal_step(named(policy), zero, 0.1, zero, 0.0, ewc)
    for n, w in named(policy).items():
        torch.testing.assert_close(w.detach(), ewc.anchor[n])


def test_a_gradient_that_is_not_finite_changes_nothing():
    w = {"a": torch.ones(2), "b": torch.ones(2)}
    gradients = {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}
    with pytest.raises(Diverged, match="gradient of b"):
        proximal_step(w, gradients, 0.1, w, 0.0)
    assert torch.equal(w["a"], torch.ones(2))
