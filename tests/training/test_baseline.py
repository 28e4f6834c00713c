"""What returns are measured against: other answers to the same question, and a fitted value."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bem.config import PolicyGradientConfig
from bem.errors import Diverged
from bem.training.baseline import explained_variance, fit_value, leave_one_out


def bits(module):
    return [p.detach().clone() for p in module.parameters()]


def same_bits(module, saved):
    return all(torch.equal(p, q) for p, q in zip(module.parameters(), saved, strict=True))


def test_every_answer_is_judged_against_the_others_to_its_question():
    returns = np.array([1.0, 0.0, 0.5, 0.2, 0.2, 0.2])
    expected = [0.25, 0.75, 0.5, 0.2, 0.2, 0.2]  # means of the two others
    assert leave_one_out(returns, 3) == pytest.approx(expected)
    assert (leave_one_out(returns, 1) == 0).all()
    with pytest.raises(ValueError, match="multiple of samples"):
        PolicyGradientConfig(episodes=6, samples=4)


class Critic(nn.Module):
    def __init__(self, flat=True):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.flat = nn.Linear(3, 1), flat

    def forward(self, obs):
        return self.net(obs)[:, 0] if self.flat else self.net(obs)


def regression():
    obs = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    return obs, obs @ torch.tensor([1.0, -2.0, 0.5]) + 3


def test_the_critic_learns_a_linear_value_and_says_how_well():
    critic, (obs, targets) = Critic(), regression()
    fit = fit_value(critic, obs, targets, 60, 20, 0.02, torch.Generator().manual_seed(0))
    rest = (targets - critic(obs)).detach().var(correction=0)
    assert fit.before < 0.5 < 0.99 < fit.after
    assert fit.after == pytest.approx(1 - float(rest / targets.var(correction=0)), rel=1e-4)


def test_the_critic_repeats_with_its_seed():
    obs, targets = regression()
    twins = [Critic(), Critic()]
    for critic in twins:
        fit_value(critic, obs, targets, 2, 16, 0.01, torch.Generator().manual_seed(4))
    assert same_bits(twins[0], bits(twins[1]))


def test_explained_variance_is_zero_for_a_constant_and_undefined_without_spread():
    class Constant(nn.Module):
        def forward(self, obs):
            return torch.full((len(obs),), 2.0)

    obs, targets = regression()
    assert explained_variance(Constant(), obs, targets) == pytest.approx(0)
    assert math.isnan(explained_variance(Constant(), obs, torch.ones(200)))


def test_a_critic_with_a_column_instead_of_a_row_is_refused():
    obs, targets = regression()
    with pytest.raises(ValueError, match=r"\(200, 1\) for targets \(200,\)"):
        fit_value(Critic(flat=False), obs, targets, 1, 20, 0.01, torch.Generator())


def test_a_critic_that_diverges_is_left_as_it_was():
    critic, (obs, targets) = Critic(), regression()
    saved = bits(critic)
    with pytest.raises(Diverged, match="value targets are not finite"):
        fit_value(critic, obs, targets * float("nan"), 1, 20, 0.01, torch.Generator())
    with pytest.raises(Diverged, match="the critic diverged; lower its learning rate"):
        fit_value(critic, obs, targets, 3, 20, 1e37, torch.Generator())
    assert same_bits(critic, saved)
