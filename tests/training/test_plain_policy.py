"""A policy that follows its reader, and whose Q never contradicts it."""

import pytest
import torch

from bem.routing.action import ActionSpace
from bem.routing.policy import MacroPolicy, Observed
from bem.training.plain_policy import follow_reader, worth_of


@pytest.fixture
def policy():
    observed = Observed(6, 0, ActionSpace(("a", "b"), (64,), (4,), (1.0,)))
    made = MacroPolicy(16, observed, 8, 8)
    follow_reader(made, worth=0.25)
    return made


def observation(policy, memory, anything=1.0):
    seen = torch.zeros(policy.actor.observed.width)
    seen[:6], seen[6:9] = memory, torch.tensor([1.0, anything, 0.3])
    seen[9:] = torch.randn(len(seen) - 9)  # value and what was done: nobody asks
    return seen


def test_the_most_likely_expert_is_the_reader_s(policy):
    memory = torch.randn(20, 6) / 3
    seen = torch.stack([observation(policy, m) for m in memory])
    found = policy.actor.logits(seen)[0]
    torch.testing.assert_close(found, policy.actor.expert_bias(memory), atol=0.02, rtol=0)


def test_while_nothing_was_read_the_bare_base_is_chosen(policy):
    policy.actor.expert_bias.bias.data[:] = torch.tensor([-30.0, 0.0, 5.0])
    seen = observation(policy, torch.zeros(6), anything=0.0)
    assert policy.actor.logits(seen)[0].argmax() == 0
    assert policy.actor.logits(observation(policy, torch.zeros(6)))[0].argmax() == 2


def test_q_differs_by_what_the_logits_are_worth(policy):
    memory = torch.randn(20, 6) / 3
    value, q = policy.critic(torch.stack([observation(policy, m) for m in memory]))
    z = policy.actor.expert_bias(memory)
    torch.testing.assert_close(q[:, 2] - q[:, 1], 0.25 * (z[:, 2] - z[:, 1]), atol=2e-3, rtol=0.01)
    assert not value.any()


def test_the_worth_of_a_logit_is_its_slope_against_regret():
    regrets = torch.tensor([[0.0, 0.6], [0.2, 0.0]])
    logits = -2.0 * regrets + torch.tensor([[5.0], [1.0]])  # what all options share tells nothing
    assert worth_of(logits, regrets) == pytest.approx(0.5)
    assert worth_of(-logits, regrets) == 1e-3  # logits that mislead are worth next to nothing
