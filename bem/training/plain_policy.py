"""A policy that does what its reader says, and nothing else: for routers that learn from few rows.

    actor    logits = expert_bias(memory); while nothing was read, the bare base
             + sight(memory, picture), where the router reads one
    critic   Q(f) - Q(e) = worth * (logit_f - logit_e),  value 0

Q moves with the logits, so that hysteresis, whose unit is nats, never contradicts them: with a threshold of
0 the most likely expert is taken. Every weight that is set to zero here can be trained later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bem.routing.policy import MacroPolicy

SURE = 50.0
"""Logit of the bare base while nothing was read is twice this."""
LINEAR = 0.1
"""Scale at which tanh is a straight line, to 0.4 %, for a memory within [-1, 1]."""


@torch.no_grad()
def follow_reader(policy: MacroPolicy, worth: float) -> None:
    """Set the actor's net and the critic.

    Args:
        worth: nats of regret that one unit of a logit stands for, > 0.
    """
    bias = policy.actor.expert_bias
    memory = bias.in_features
    net, critic = policy.actor.net, policy.critic.net
    assert critic.read.out_features >= memory, "the hidden layer hands the memory on"
    _silence(net.out)
    anything = policy.actor.observed.read - 2  # the last three: a turn begins, anything, number
    net.read.weight[0], net.read.bias[0] = 0.0, 5.0
    net.read.weight[0, anything] = -10.0
    if net.done is not None:
        net.done.weight[0] = 0.0
    net.out.weight[0, 0], net.out.bias[0] = SURE, SURE
    _silence(critic.read)
    _silence(critic.out)
    critic.read.weight[:memory, :memory] = LINEAR * torch.eye(memory)
    critic.out.weight[1:, :memory] = worth / LINEAR * bias.weight
    critic.out.bias[1:] = worth * bias.bias
    if policy.actor.sight is not None:
        policy.actor.sight.worth.fill_(worth)


def worth_of(logits: Tensor, regrets: Tensor) -> float:
    """Nats that a unit of a logit stands for, by least squares over differences between options.

    Args:
        logits, regrets: (turns, options) of rows that the logits were not fitted to.
    """
    z = logits - logits.mean(-1, keepdim=True)
    lost = regrets - regrets.mean(-1, keepdim=True)
    return max(1e-3, float(-(z * lost).sum() / z.square().sum().clamp(min=1e-6)))


def _silence(layer: torch.nn.Linear) -> None:
    layer.weight.zero_()
    layer.bias.zero_()
