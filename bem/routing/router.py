"""The agentic router: at every chunk boundary it decides which expert speaks, for how long, with how
many ranks and how strongly.

    state = memory of what was said (see `Reader`), evidence, picture, the last action, chunk number, value
    action = (expert, span, rank budget, strength)

It takes the controller's place in a forward pass: it reads the hidden states that enter one early
layer, so that a prompt is routed in one pass, and a chunk's action depends on earlier tokens only.
Its memory is the tail of each chunk's control and travels with the K/V cache.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bem.control.controller import ChunkReader, Pooled
from bem.control.wiring import Acting
from bem.errors import AttachError
from bem.experts.compose import TrustRegion
from bem.routing.action import FADE, HEADS, PLAN, RECORD, SPAN_LEFT, ActionSpace, constant
from bem.routing.composer import Composer, Rules
from bem.routing.distribution import HeadsDistribution
from bem.routing.hysteresis import Allowed, Boundary, allowed, execute, fade_of
from bem.routing.policy import MacroPolicy, Observed

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One chunk boundary of a batch: what was seen, what could be done, what was done."""

    observation: Tensor  # (batch, Observed.width)
    boundary: Boundary
    allowed: Allowed
    distribution: HeadsDistribution
    action: Tensor  # int (batch, 4)
    record: Tensor  # (batch, RECORD) afterwards
    real: Tensor  # bool (batch,): the chunk holds tokens
    forced: Tensor  # bool (batch,): the caller's route said so


@dataclass(frozen=True)
class _Seen:
    """What the policy reads at every chunk of a piece."""

    read: Tensor  # (batch, slots, Observed.read + 1): the value is the last number
    q: Tensor  # (batch, slots, experts + 1)
    begun: tuple[Tensor, Tensor]  # what the actor makes of it, (batch, slots, ...)

    def begun_at(self, s: int) -> tuple[Tensor, Tensor]:
        """The actor's half of a decision at one slot."""
        return self.begun[0][:, s], self.begun[1][:, s]


Chooser = Callable[[HeadsDistribution], Tensor]


class AgenticRouter(ChunkReader):
    """Routes a stack of experts; see the module's docstring.

    A caller may give a route: int (batch, tokens), or (batch, tokens, 4) for whole actions. A chunk
    takes its first token's; -1 holds the action before. A given route is followed whatever the
    rules say: it is how experts are trained, oracles measured and controls run.
    """

    routes = True
    available: Tensor  # bool (experts + 1,): the bare base stands first

    def __init__(self, policy: MacroPolicy, rules: Rules):
        super().__init__()
        self.policy, self.rules, self.limits = policy, rules, rules.limits
        self.observed: Observed = policy.actor.observed
        self.width, self.chunk_size = policy.reader.d_read, rules.chunk_size
        self.tail_width = RECORD + self.observed.memory
        told = {"evidence": self.observed.n_evidence, "vision": self.observed.n_vision}
        self.conditioning = {name: width for name, width in told.items() if width}
        self.register_buffer("available", torch.ones(self.space.sizes[0], dtype=torch.bool))
        self.trained = False
        """Until it is, the bare base answers: nobody has taught the policy anything."""
        self.composer = Composer()
        self.source: Callable[[], Acting | None] = lambda: None
        """What acts now; see `Mounted.pack`."""
        self._said = False  # that it is not trained
        self.chooser: Chooser | None = None  # None: the most likely possible option of each head
        self.tape: list[Step] | None = None

    @property
    def space(self) -> ActionSpace:
        """The options of each head."""
        return self.rules.space

    @property
    def region(self) -> TrustRegion | None:
        """Of every composed update."""
        return self.rules.region

    def twin(self, policy: MacroPolicy | None = None) -> AgenticRouter:
        """A router of the same rules and experts; policy: None: a copy of this one's."""
        twin = AgenticRouter(copy.deepcopy(self.policy) if policy is None else policy, self.rules)
        twin.limits, twin.trained = self.limits, self.trained
        twin.available = self.available.clone()
        twin.source, twin.origin, twin.encoder = self.source, self.origin, self.encoder
        return twin.train(self.training)

    def at_strength(self, factor: float) -> AgenticRouter:
        """The same policy, what its experts do times a factor, inside the same trust region."""
        space = replace(self.space, factor=factor)
        scaled = AgenticRouter(self.policy, replace(self.rules, space=space))
        scaled.limits, scaled.trained, scaled.available = self.limits, self.trained, self.available
        scaled.source, scaled.origin = self.source, self.origin
        return scaled.train(self.training)

    def acting(self) -> Acting | None:
        return self.source()

    @contextmanager
    def watched(self, chooser: Chooser | None = None) -> Iterator[list[Step]]:
        """Note every decision made inside, and let `chooser` make it."""
        before = self.chooser, self.tape
        self.chooser, self.tape = chooser, []
        try:
            yield self.tape
        finally:
            self.chooser, self.tape = before

    @torch.no_grad()
    def features(self, hidden: Tensor, head_input: Tensor | None) -> Tensor:
        return self.policy.reader.embed(hidden)

    @torch.no_grad()
    def decide(
        self,
        members: Sequence[Any],
        pooled: Pooled,
        turns: Tensor | None,
        conditioning: dict[str, Tensor],
        route: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        first, number = pooled.first_tokens, pooled.number[:, 1:]
        real = pooled.count[:, 1:] > 0
        turn = torch.zeros_like(real) if turns is None else turns.gather(1, first) & real
        given = self._given(route, first)
        tail = pooled.before.control[:, pooled.before.control.shape[1] - self.tail_width :]
        record, before = tail.split([RECORD, self.observed.memory], -1)
        memory = self.policy.reader.update_memory(pooled.sums[:, :-1].float(), before)
        seen = None
        if given is None or self.tape is not None:  # the policy is not needed for a given route
            seen = self._see(memory, conditioning, pooled, turn)
        records, nothing = [], record.new_empty(0)
        for s in range(number.shape[1]):
            q = nothing if seen is None else seen.q[:, s]
            at = Boundary(record, number[:, s], turn[:, s], q)
            action = None if given is None else given[:, s]
            record = self._step(seen, s, at, real[:, s], action)
            records.append(record)
        decided = torch.stack(records, 1)
        packed = [member.at(dtype) for member in members]
        control = self.composer(packed, decided, self.rules)
        return torch.cat([control, decided.double(), memory.double()], -1)

    def _see(
        self, memory: Tensor, conditioning: dict[str, Tensor], pooled: Pooled, turn: Tensor
    ) -> _Seen:
        """What the policy reads at every chunk; of what it does nothing is known yet."""
        anything = (pooled.before.done_count[:, None] + pooled.count[:, :-1].cumsum(1)) > 0
        numbers = [turn.float(), anything.float(), pooled.number[:, 1:].float().log() / 4]
        told = [conditioning[name] for name in self.conditioning]
        parts = [memory, *told, torch.stack(numbers, -1)]
        read = torch.cat(parts, -1)
        value, q = self.policy.critic(read)
        actor = self.policy.actor
        if actor.sight is not None:
            q = q + actor.sight.worth * actor.seen(read, actor.expert_bias(memory))
        read = torch.cat([read, value[..., None]], -1)
        return _Seen(read, q, self.policy.actor.begin(read))

    def _step(
        self, seen: _Seen | None, s: int, at: Boundary, real: Tensor, given: Tensor | None
    ) -> Tensor:
        """One decision of every row; returns the records afterwards."""
        if seen is None:
            assert given is not None
            nothing = torch.zeros_like(at.record[:, FADE])
            return execute(at, given.clamp(min=0), given[:, 0] == -1, nothing, self.space)
        options = allowed(at, self.space, self.limits, self.available)
        done = self._done(at.record, options.in_force)
        logits = self.policy.actor.finish(seen.begun_at(s), done)
        if self.tape is None:
            action = _most_likely(logits, options.possible, self.space.sizes)
            return execute(at, action, options.hold, self._fade(logits, action), self.space)
        distribution = HeadsDistribution(logits.split(self.space.sizes, -1), options.masks, HEADS)
        forced = torch.zeros_like(real) if given is None else given[:, 0] != -1
        hold = options.hold if given is None else ~forced
        action = self._chosen(distribution) if given is None else given.clamp(min=0)
        fade = torch.where(forced, 0.0, self._fade(logits, action))
        record = execute(at, action, hold, fade, self.space)
        observation = torch.cat([seen.read[:, s], done], -1)
        self.tape.append(Step(observation, at, options, distribution, action, record, real, forced))
        return record

    def _chosen(self, distribution: HeadsDistribution) -> Tensor:
        return distribution.mode() if self.chooser is None else self.chooser(distribution)

    def _done(self, record: Tensor, in_force: Tensor) -> Tensor:
        """What was done before, as the policy reads it (batch, Observed.done)."""
        counts = record.index_select(1, constant((SPAN_LEFT, PLAN), record.device))
        most = (float(self.space.spans[-1]), float(self.limits.plan_length))
        return torch.cat([in_force, counts / constant(most, record.device)], -1)

    def _fade(self, logits: Tensor, action: Tensor) -> Tensor:
        """16ths that the chosen expert gives up: how sure the policy is, before any rule but loading."""
        if not self.rules.confidence:
            return logits.new_zeros(len(logits))
        experts = logits[:, : len(self.available)]
        probability = experts.masked_fill(~self.available, -torch.inf).softmax(-1)
        fade = fade_of(probability.gather(1, action[:, :1])[:, 0], self.rules.confidence)
        return torch.where(action[:, 0] == self.rules.fallback, 0.0, fade)

    def _given(self, route: Tensor | None, first: Tensor) -> Tensor | None:
        """The action of each chunk that the policy is not asked for, int (batch, slots, 4); -1: hold."""
        if route is not None:
            return self._routed(route, first)
        if self.trained or self.chooser is not None:
            return None
        if not self._said:
            self._said = True
            LOG.warning(
                "this router was never trained: the bare base answers. Train it, or give route=."
            )
        return self.space.full(torch.zeros_like(first))

    def _routed(self, route: Tensor, first: Tensor) -> Tensor:
        """The caller's action at each chunk.

        Raises:
            AttachError: another shape, or an option that does not exist.
        """
        if route.dim() == 2:
            route = torch.where(route[..., None] < 0, -1, self.space.full(route.clamp(min=0)))
        sizes = constant(self.space.sizes, route.device)
        problem = (
            f"route must hold expert options below {self.space.sizes[0]}, (batch, tokens), or whole actions "
            f"below {self.space.sizes}, (batch, tokens, 4)"
        )
        if route.dim() != 3 or route.shape[-1] != 4:
            raise AttachError(f"{problem}; got {tuple(route.shape)}.")
        inside = (route < sizes).all()
        if (
            route.shape[1] == 1
        ):  # a decoded token: nothing is read back, torch raises when it comes to it
            torch._assert_async(inside, problem)
        elif not bool(inside):
            raise AttachError(f"{problem}; got {tuple(route.shape)}, largest {int(route.max())}.")
        return route.gather(1, first[..., None].expand(-1, -1, 4))

    def flops_per_chunk(self) -> int:
        return self.policy.flops(self.chunk_size)


def _most_likely(logits: Tensor, possible: Tensor, sizes: Sequence[int]) -> Tensor:
    """Most likely possible option of each head, int (batch, heads); of equal ones the first."""
    heads = torch.where(possible, logits, -torch.inf).split(list(sizes), -1)
    return torch.stack([head.argmax(-1) for head in heads], -1)
