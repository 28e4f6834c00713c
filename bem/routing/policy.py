"""The macro policy: memory and the last action in, a distribution over actions out.

    h = tanh(W [memory, evidence, picture, turn, chunk number, value] + V [last action, span, plan] + b)
    logits of expert, span, rank budget and strength = heads(h)
    logits of expert += expert_bias(memory) + sight(memory, picture)

`expert_bias` is a linear map from memory to expert logits, trained with the reader. `Sight` is what a picture adds.
What is read (W) is the same for all chunks of a prompt at once; only what was done before (V) must
wait for the chunk before. The critic is a network of its own that sees what was read, and nothing of
what was done: it gives the value of the state and Q of every expert, which hysteresis compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bem.routing.action import HEADS, ActionSpace
from bem.routing.distribution import HeadsDistribution
from bem.routing.reader import Reader


@dataclass(frozen=True)
class Observed:
    """Sizes of an observation: what was read, the critic's value of it, what was done."""

    memory: int
    n_evidence: int
    space: ActionSpace
    n_vision: int = 0

    @property
    def read(self) -> int:
        """Memory, evidence, picture, whether a turn begins, whether anything was read, chunk number."""
        return self.memory + self.n_evidence + self.n_vision + 3

    @property
    def picture(self) -> slice:
        """Where in what is read the picture stands."""
        first = self.memory + self.n_evidence
        return slice(first, first + self.n_vision)

    @property
    def done(self) -> int:
        """Options in force (as one-hot), chunks of the span that are left, actions in the plan."""
        return sum(self.space.sizes) + 2

    @property
    def width(self) -> int:
        """Numbers of a whole observation."""
        return self.read + 1 + self.done

    def valued(
        self, observation: Float[Tensor, "*batch width"], value: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch width"]:
        """An observation with another value."""
        read, _, done = observation.split([self.read, 1, self.done], -1)
        return torch.cat([read, value[..., None], done], -1)


class Net(nn.Module):
    """One hidden layer over what was read and what was done. Dropout is for cloning alone."""

    def __init__(self, read: int, done: int, hidden: int, out: int, gain: float):
        """done: 0, there is no such input; gain: scale of the last layer's first weights."""
        super().__init__()
        self.dropout = nn.Dropout(0.0)
        self.read = nn.Linear(read, hidden)
        self.done = nn.Linear(done, hidden, bias=False) if done else None
        self.out = nn.Linear(hidden, out)
        for layer, scale in ((self.read, 2**0.5), (self.done, 2**0.5), (self.out, gain)):
            if layer is not None:
                nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(self.read.bias)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, read: Float[Tensor, "*batch read"], done: Float[Tensor, "*batch done"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        return self.finish(self.begin(read), done)

    def begin(self, read: Float[Tensor, "*batch read"]) -> Float[Tensor, "*batch hidden"]:
        """The half of the hidden layer that needs no action; feed it to `finish`."""
        return self.read(self.dropout(read))

    def finish(
        self,
        begun: Float[Tensor, "*batch hidden"],
        done: Float[Tensor, "*batch done"] | None = None,
    ) -> Float[Tensor, "*batch out"]:
        """The output, once what was done is known."""
        if self.done is not None:
            begun = begun + self.done(done)
        return self.out(self.dropout(torch.tanh(begun)))

    def flops(self) -> int:
        """Matrix FLOPs of one observation."""
        layers = (self.read, self.done, self.out)
        return 2 * sum(layer.weight.numel() for layer in layers if layer is not None)


class Sight(nn.Module):
    """What a picture adds to the experts' logits: p g (W picture - logits by the text).

    p is the picture's first number, its gate; g = sigmoid(a memory + b) is how far the text leaves the choice to the
    picture. Without a picture, or at gate 0, nothing is added. Fitted by `bem.training.picture`; shut until then.
    """

    worth: Tensor
    """Nats of Q that a unit of logit stands for: hysteresis compares Q, which follows."""

    def __init__(self, memory: int, n_vision: int, experts: int):
        super().__init__()
        self.asked = nn.Linear(memory, 1)
        self.vote = nn.Linear(n_vision, experts, bias=False)
        nn.init.zeros_(self.asked.weight)
        nn.init.constant_(self.asked.bias, -30.0)
        nn.init.zeros_(self.vote.weight)
        self.register_buffer("worth", torch.zeros(()))

    def forward(
        self,
        memory: Float[Tensor, "*batch memory"],
        picture: Float[Tensor, "*batch features"],
        text: Float[Tensor, "*batch experts"],
    ) -> Float[Tensor, "*batch experts"]:
        return picture[..., :1] * self.asked(memory).sigmoid() * (self.vote(picture) - text)


class Actor(nn.Module):
    """The policy proper. Starts nearly uniform."""

    def __init__(self, observed: Observed, hidden: int):
        super().__init__()
        self.observed, self.sizes = observed, observed.space.sizes
        self.expert_bias = nn.Linear(observed.memory, self.sizes[0])
        self.sight: Sight | None = None
        if observed.n_vision:
            self.sight = Sight(observed.memory, observed.n_vision, self.sizes[0])
        self.net = Net(observed.read + 1, observed.done, hidden, sum(self.sizes), 0.01)

    def logits(self, observation: Float[Tensor, "*batch width"]) -> tuple[Tensor, ...]:
        """Logits (..., options) of each head."""
        read, done = observation.split([self.observed.read + 1, self.observed.done], -1)
        return self.finish(self.begin(read), done).split(self.sizes, -1)

    def begin(self, read: Float[Tensor, "*batch read"]) -> tuple[Tensor, Tensor]:
        """What needs no action, from all that was read and its value: feed it to `finish`.

        Returns:
            (hidden layer's half (..., hidden), bias of all logits (..., options of all heads)).
        """
        bias = self.expert_bias(read[..., : self.observed.memory])
        if self.sight is not None:
            bias = bias + self.seen(read, bias)
        others = sum(self.sizes) - self.sizes[0]
        return self.net.begin(read), nn.functional.pad(bias, (0, others))

    def seen(
        self, read: Float[Tensor, "*batch read"], text: Float[Tensor, "*batch experts"]
    ) -> Float[Tensor, "*batch experts"]:
        """What the picture adds to the experts' logits; text: these by the text alone."""
        assert self.sight is not None
        return self.sight(read[..., : self.observed.memory], read[..., self.observed.picture], text)

    def finish(
        self, begun: tuple[Tensor, Tensor], done: Float[Tensor, "*batch done"]
    ) -> Float[Tensor, "*batch options"]:
        """Logits of all heads side by side."""
        hidden, bias = begun
        return bias + self.net.finish(hidden, done)

    def distribution(
        self,
        observation: Float[Tensor, "*batch width"],
        masks: Sequence[Bool[Tensor, "*batch _"]],
    ) -> HeadsDistribution:
        """Distribution over actions; `masks` (..., options) of each head: True where possible."""
        return HeadsDistribution(self.logits(observation), masks, HEADS)

    def flops(self) -> int:
        """Matrix FLOPs of one observation."""
        return self.net.flops() + 2 * self.expert_bias.weight.numel()


class Critic(nn.Module):
    """Value of a state and of every expert in it."""

    def __init__(self, observed: Observed, hidden: int):
        super().__init__()
        self.read = observed.read
        self.net = Net(observed.read, 0, hidden, 1 + observed.space.sizes[0], 1.0)

    def forward(
        self, observation: Float[Tensor, "*batch width"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch experts"]]:
        """V and Q of every expert option, of whole observations or of what was read alone."""
        out = self.net(observation[..., : self.read])
        return out[..., 0], out[..., 1:]


class MacroPolicy(nn.Module):
    """Reader, actor and critic of one router. In float32, whatever the model computes in."""

    def __init__(self, d_model: int, observed: Observed, d_read: int, hidden: int):
        super().__init__()
        self.reader = Reader(d_model, d_read, observed.memory)
        self.actor = Actor(observed, hidden)
        self.critic = Critic(observed, hidden)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MacroPolicy:
        """`model.half()` and `model.to(...)` move it, and leave its numbers as they are: a decision must
        not hang on the dtype of the weights that it chooses between."""

        def moved(t: Tensor) -> Tensor:
            new = fn(t)
            return new if new.dtype == t.dtype else t.to(new.device)

        return super()._apply(moved, recurse)

    def flops(self, tokens: int) -> int:
        """Matrix FLOPs of one decision, for a chunk of so many tokens."""
        return self.reader.flops(tokens) + self.actor.flops() + self.critic.net.flops()
