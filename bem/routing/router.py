"""The agentic router: at every chunk boundary it decides which expert speaks, for how long, with how
many ranks and how strongly.

    state = memory of what was said (see `Reader`), evidence, the last action, chunk number, value
    action = (expert, span, rank budget, strength)

It takes the controller's place in a forward pass: it reads the hidden states that enter one early
layer, so that a prompt is routed in one pass, and a chunk's action depends on earlier tokens only.
Its memory is the tail of each chunk's control and travels with the K/V cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bem.control.controller import ChunkReader, Routed, first_tokens
from bem.errors import AttachError
from bem.experts.compose import TrustRegion
from bem.routing.action import FADE, HEADS, PLAN, RECORD, SPAN_LEFT, ActionSpace, constant
from bem.routing.composer import Composer
from bem.routing.distribution import HeadsDistribution, modes
from bem.routing.hysteresis import (
    Allowed,
    Boundary,
    Limits,
    allowed,
    execute,
    fade_of,
    go_on,
    in_span,
)
from bem.routing.policy import MacroPolicy, Observed


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

    available: Tensor  # bool (experts + 1,): the bare base stands first

    def __init__(
        self,
        d_model: int,
        space: ActionSpace,
        limits: Limits,
        chunk_size: int = 64,
        d_read: int = 32,
        memory: int = 48,
        hidden: int = 48,
        confidence: float = 0.0,
        fallback: int = 0,
        n_evidence: int = 0,
        region: TrustRegion | None = None,
    ):
        """confidence, fallback (an expert option), region: see `RouterConfig`."""
        super().__init__()
        self.width, self.chunk_size = d_read, chunk_size
        self.space, self.limits = space, limits
        self.confidence, self.fallback, self.region = confidence, fallback, region
        self.n_evidence = n_evidence
        self.observed = Observed(memory, n_evidence, space)
        self.policy = MacroPolicy(d_model, self.observed, d_read, hidden)
        self.tail_width = RECORD + memory + n_evidence
        self.register_buffer("available", torch.ones(len(space.experts) + 1, dtype=torch.bool))
        self.composer = Composer()
        self.chooser: Chooser | None = None  # None: the most likely possible option of each head
        self.tape: list[Step] | None = None

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
        pooled: Routed,
        turns: Tensor | None,
        evidence: Tensor | None,
        route: Tensor | None,
    ) -> Tensor:
        first, number = first_tokens(pooled), pooled.number[:, 1:]
        real = pooled.count[:, 1:] > 0
        turn = torch.zeros_like(real) if turns is None else turns.gather(1, first) & real
        wanted = None if route is None else self._wanted(route, first)
        tail = pooled.before.control[:, pooled.before.control.shape[1] - self.tail_width :]
        record, before = tail[:, : RECORD + self.observed.memory].split(
            [RECORD, self.observed.memory], -1
        )
        memory = self.policy.reader.update_memory(pooled.sums[:, :-1], before)
        seen = None
        if wanted is None or self.tape is not None:  # else nobody asks what the policy thinks
            seen = self._see(memory, evidence, pooled, turn)
        records, nothing = [], record.new_empty(0)
        for s in range(number.shape[1]):
            at = Boundary(
                record, number[:, s], turn[:, s], nothing if seen is None else seen.q[:, s]
            )
            want = None if wanted is None else wanted[:, s]
            record = self._step(seen, s, at, real[:, s], want)
            records.append(record)
        kept = torch.stack(records, 1)
        control = self.composer(members, kept, self.space, self.fallback, self.region)
        parts = [control, kept, memory]
        return torch.cat(parts if evidence is None else [*parts, evidence], -1)

    def _see(self, memory: Tensor, evidence: Tensor | None, pooled: Routed, turn: Tensor) -> _Seen:
        """What the policy reads at every chunk; of what it does nothing is known yet."""
        anything = (pooled.before.done_count[:, None] + pooled.count[:, :-1].cumsum(1)) > 0
        numbers = [turn.float(), anything.float(), pooled.number[:, 1:].float().log() / 4]
        parts = [memory, *([] if evidence is None else [evidence]), torch.stack(numbers, -1)]
        read = torch.cat(parts, -1)
        value, q = self.policy.critic(read)
        read = torch.cat([read, value[..., None]], -1)
        return _Seen(read, q, self.policy.actor.begin(read))

    def _step(
        self, seen: _Seen | None, s: int, at: Boundary, real: Tensor, wanted: Tensor | None
    ) -> Tensor:
        """One decision of every row; returns the records afterwards."""
        if seen is None:
            assert wanted is not None
            nothing = torch.zeros_like(at.record[:, FADE])
            return execute(at, wanted.clamp(min=0), wanted[:, 0] == -1, nothing, self.space)
        if self.tape is None and bool(in_span(at, self.available).all()):
            return go_on(at.record)
        options = allowed(at, self.space, self.limits, self.available)
        done = self._done(at.record, options.in_force)
        logits = self.policy.actor.finish(seen.begun_at(s), done)
        if self.tape is None:
            action = modes(logits, options.possible, self.space.sizes)
            return execute(at, action, options.hold, self._fade(logits, action), self.space)
        known = HeadsDistribution(logits.split(self.space.sizes, -1), options.masks, HEADS)
        forced = torch.zeros_like(real) if wanted is None else wanted[:, 0] != -1
        hold = options.hold if wanted is None else ~forced
        action = self._chosen(known) if wanted is None else wanted.clamp(min=0)
        fade = torch.where(forced, 0.0, self._fade(logits, action))
        record = execute(at, action, hold, fade, self.space)
        observation = torch.cat([seen.read[:, s], done], -1)
        self.tape.append(Step(observation, at, options, known, action, record, real, forced))
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
        if not self.confidence:
            return logits.new_zeros(len(logits))
        experts = logits[:, : len(self.available)]
        probability = experts.masked_fill(~self.available, -torch.inf).softmax(-1)
        fade = fade_of(probability.gather(1, action[:, :1])[:, 0], self.confidence)
        return torch.where(action[:, 0] == self.fallback, 0.0, fade)

    def _wanted(self, route: Tensor, first: Tensor) -> Tensor:
        """The caller's action at each chunk, int (batch, slots, 4); -1: hold."""
        if route.dim() == 2:
            route = torch.where(route[..., None] < 0, -1, self.space.full(route.clamp(min=0)))
        sizes = torch.tensor(self.space.sizes, device=route.device)
        if route.dim() != 3 or route.shape[-1] != 4 or (route >= sizes).any():
            raise AttachError(
                f"route must hold expert options below {self.space.sizes[0]}, (batch, tokens), or whole actions "
                f"below {self.space.sizes}, (batch, tokens, 4); got {tuple(route.shape)}, largest {int(route.max())}."
            )
        return route.gather(1, first[..., None].expand(-1, -1, 4))

    def flops_per_chunk(self) -> int:
        return self.policy.flops(self.chunk_size)
