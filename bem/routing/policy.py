"""The macro policy: pooled hidden states and the last action in, a distribution over actions out.

    h = tanh(W [read(last chunk), read(the one before), read(the turn), read(all earlier), rest] + b)
    logits of expert, span, rank budget and strength = heads(h)

`read` maps each pooled hidden state to a few numbers. The critic is a network of the same form with
no weight in common: it gives the value of the state and Q of every expert, which hysteresis compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bem.routing.action import HEADS, ActionSpace
from bem.routing.distribution import HeadsDistribution

WINDOWS = 4  # pooled hidden states in an observation


@dataclass(frozen=True)
class Observed:
    """Sizes of an observation: WINDOWS pooled states, evidence, the last action, and the value."""

    d_model: int
    n_evidence: int
    space: ActionSpace

    @property
    def rest(self) -> int:
        """Numbers behind the pooled states, the value not counted."""
        experts, _, ranks, strengths = self.space.sizes
        return self.n_evidence + experts + ranks + strengths + 5

    @property
    def width(self) -> int:
        """Numbers of a whole observation; the last one is the critic's value."""
        return WINDOWS * self.d_model + self.rest + 1


class Net(nn.Module):
    """Reads the pooled states, then one hidden layer.

    Pooled states are centred and scaled number by number, once `standardise` has seen some; dropout
    is for cloning alone, everything else runs in eval mode.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, d_model: int, rest: int, d_read: int, hidden: int, out: int, gain: float):
        super().__init__()
        self.d_model = d_model
        self.register_buffer("centre", torch.zeros(d_model))
        self.register_buffer("spread", torch.ones(d_model))
        self.dropout = nn.Dropout(0.0)
        self.read = nn.Linear(d_model, d_read, bias=False)
        self.inner = nn.Linear(WINDOWS * d_read + rest, hidden)
        self.out = nn.Linear(hidden, out)
        for layer, scale in ((self.read, 1.0), (self.inner, 2**0.5), (self.out, gain)):
            nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(self.inner.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, observation: Tensor) -> Tensor:
        pooled, rest = observation.split(
            [WINDOWS * self.d_model, observation.shape[-1] - WINDOWS * self.d_model], -1
        )
        windows = pooled.unflatten(-1, (WINDOWS, self.d_model))
        seen = (windows != 0).any(-1, keepdim=True)
        windows = self.dropout((windows - self.centre) / self.spread * seen)
        read = torch.cat([self.read(windows).flatten(-2), rest], -1)
        return self.out(self.dropout(torch.tanh(self.inner(read))))

    @torch.no_grad()
    def standardise(self, observations: Tensor) -> None:
        """Take centre and scale from observations (n, width)."""
        windows = observations[:, : WINDOWS * self.d_model].reshape(-1, self.d_model)
        windows = windows[(windows != 0).any(-1)]
        self.centre.copy_(windows.mean(0))
        self.spread.copy_(windows.std(0).clamp(min=0.1))

    def flops(self) -> int:
        """Matrix FLOPs of one observation."""
        read = WINDOWS * self.read.weight.numel()
        return 2 * (read + self.inner.weight.numel() + self.out.weight.numel())


class Actor(nn.Module):
    """The policy proper. Starts nearly uniform."""

    def __init__(self, sizes: Observed, d_read: int, hidden: int):
        super().__init__()
        self.sizes = sizes.space.sizes
        out = sum(self.sizes)
        self.net = Net(sizes.d_model, sizes.rest + 1, d_read, hidden, out, 0.01)

    def logits(self, observation: Tensor) -> tuple[Tensor, ...]:
        """Logits (..., n_h) of each head."""
        return self.net(observation).split(self.sizes, -1)

    def distribution(self, observation: Tensor, masks: Sequence[Tensor]) -> HeadsDistribution:
        """Over actions, for observations (..., width)."""
        return HeadsDistribution(self.logits(observation), masks, HEADS)


class Critic(nn.Module):
    """Value of a state and of every expert in it; reads an observation without its last number."""

    def __init__(self, sizes: Observed, d_read: int, hidden: int):
        super().__init__()
        out = 1 + sizes.space.sizes[0]
        self.net = Net(sizes.d_model, sizes.rest, d_read, hidden, out, 1.0)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(V (...), Q (..., experts + 1))."""
        out = self.net(observation)
        return out[..., 0], out[..., 1:]


class MacroPolicy(nn.Module):
    """Actor and critic of one router."""

    def __init__(self, sizes: Observed, d_read: int, hidden: int):
        super().__init__()
        self.actor = Actor(sizes, d_read, hidden)
        self.critic = Critic(sizes, d_read, hidden)

    def flops(self) -> int:
        """Matrix FLOPs of one decision."""
        return self.actor.net.flops() + self.critic.net.flops()
