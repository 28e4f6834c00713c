"""The agentic router: at every chunk boundary it decides which expert speaks, for how long, with how
many ranks and how strongly.

    state = pooled hidden states of the last two chunks, of the turn so far and of all that came
            before, evidence, the last action, chunk number, value estimate
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
import torch.nn.functional as F
from torch import Tensor

from bem.adapters.compose import TrustRegion
from bem.adapters.controller import ChunkReader, Routed, first_tokens
from bem.errors import AttachError
from bem.routing.action import EXPERT, FADE, PLAN, RANK, RECORD, SPAN_LEFT, STRENGTH, ActionSpace
from bem.routing.action import one_hot as _one_hot
from bem.routing.distribution import HeadsDistribution
from bem.routing.hysteresis import Allowed, Boundary, Limits, allowed, execute, fade_of, in_span
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


Chooser = Callable[[HeadsDistribution], Tensor]


def most_likely(distribution: HeadsDistribution) -> Tensor:
    """The default: the most likely possible option of each head."""
    return distribution.mode()


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
        d_read: int = 24,
        hidden: int = 48,
        confidence: float = 0.0,
        fallback: int = 0,
        n_evidence: int = 0,
        region: TrustRegion | None = None,
    ):
        """confidence, fallback (an expert option), region: see `RouterConfig`."""
        super().__init__()
        self.d_model, self.width, self.chunk_size = d_model, d_model, chunk_size
        self.space, self.limits = space, limits
        self.confidence, self.fallback, self.region = confidence, fallback, region
        self.n_evidence = n_evidence
        self.observed = Observed(d_model, n_evidence, space)
        self.policy = MacroPolicy(self.observed, d_read, hidden)
        self.tail_width = RECORD + 2 * d_model + 1 + n_evidence
        self.register_buffer("available", torch.ones(len(space.experts) + 1, dtype=torch.bool))
        self.chooser: Chooser = most_likely
        self.tape: list[Step] | None = None

    @contextmanager
    def watched(self, chooser: Chooser | None = None) -> Iterator[list[Step]]:
        """Note every decision made inside, and let `chooser` make it."""
        before = self.chooser, self.tape
        self.chooser, self.tape = chooser or self.chooser, []
        try:
            yield self.tape
        finally:
            self.chooser, self.tape = before

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
        record, before, run, tokens = tail[:, : RECORD + 2 * self.d_model + 1].split(
            [RECORD, self.d_model, self.d_model, 1], -1
        )
        last, past, seen = self._means(pooled)
        records, memories = [], []
        for s in range(number.shape[1]):
            run, tokens = run + pooled.sums[:, s], tokens + pooled.count[:, s, None]
            windows = torch.cat([last[:, s], before, _scale(run, tokens[:, 0]), past[:, s]], -1)
            given = None if evidence is None else evidence[:, s]
            boundary = Boundary(record, number[:, s], turn[:, s], record.new_zeros(()))
            want = None if wanted is None else wanted[:, s]
            record = self._step(windows, given, boundary, seen[:, s], real[:, s], want)
            goes_on = ~turn[:, s, None]  # what is read from here on belongs to the next turn
            before, run, tokens = last[:, s], run * goes_on, tokens * goes_on
            records.append(record)
            memories.append(torch.cat([before, run, tokens], -1))
        kept = torch.stack(records, 1)
        decision = self.space.decision(kept, self.fallback)
        parts = [member.compose(decision, self.region) for member in members]
        parts += [kept, torch.stack(memories, 1)]
        return torch.cat(parts if evidence is None else [*parts, evidence], -1)

    def _step(
        self,
        windows: Tensor,
        evidence: Tensor | None,
        at: Boundary,
        seen: Tensor,
        real: Tensor,
        wanted: Tensor | None,
    ) -> Tensor:
        """One decision of every row; returns the records afterwards."""
        forced = torch.zeros_like(real) if wanted is None else wanted[:, 0] != -1
        if wanted is not None and self.tape is None:  # nobody asks what the policy thinks
            action, hold = wanted.clamp(min=0), ~forced
            return execute(at, action, hold, torch.zeros_like(at.record[:, 0]), self.space)
        if self.tape is None and wanted is None and bool(in_span(at, self.available).all()):
            action = at.record.new_zeros(len(at.record), 4, dtype=torch.long)  # spans go on: held
            return execute(at, action, ~forced, at.record[:, FADE], self.space)
        observation, q = self._observe(windows, evidence, at, seen)
        at = Boundary(at.record, at.number, at.turn, q)
        options = allowed(at, self.space, self.limits, self.available)
        distribution = self.policy.actor.distribution(observation, options.masks)
        if wanted is None:
            action, hold = self.chooser(distribution), options.hold
        else:
            action, hold = wanted.clamp(min=0), ~forced
        fade = self._fade(observation, action)
        record = execute(at, action, hold, torch.where(forced, 0.0, fade), self.space)
        if self.tape is not None:
            self.tape.append(
                Step(observation, at, options, distribution, action, record, real, forced)
            )
        return record

    def _observe(
        self, windows: Tensor, evidence: Tensor | None, at: Boundary, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The observation (batch, width), and the critic's Q (batch, experts + 1)."""
        record = at.record
        experts, _, ranks, strengths = self.space.sizes
        numbers = [
            record[:, SPAN_LEFT] / self.space.spans[-1],
            record[:, PLAN] / self.limits.plan_length,
            at.turn.float(),
            seen.float(),
            at.number.float().log() / 4,
        ]
        before = [
            _one_hot(record[:, column].long(), n).float()
            for column, n in ((EXPERT, experts), (RANK, ranks), (STRENGTH, strengths))
        ]
        parts = [windows, *([] if evidence is None else [evidence]), *before]
        observation = torch.cat([*parts, torch.stack(numbers, -1)], -1)
        value, q = self.policy.critic(observation)
        return torch.cat([observation, value[:, None]], -1), q

    def _fade(self, observation: Tensor, action: Tensor) -> Tensor:
        """16ths that the chosen expert gives up: how sure the policy is, before any rule but loading."""
        if not self.confidence:
            return torch.zeros_like(observation[:, 0])
        logits = self.policy.actor.logits(observation)[0].masked_fill(~self.available, -torch.inf)
        probability = logits.softmax(-1).gather(1, action[:, :1])[:, 0]
        fade = fade_of(probability, self.confidence)
        return torch.where(action[:, 0] == self.fallback, 0.0, fade)

    def _means(self, pooled: Routed) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised means of the chunk before each slot and of all earlier tokens (batch, slots,
        d_model), and whether there are any (batch, slots)."""
        sums, count = pooled.sums[:, :-1], pooled.count[:, :-1]
        all_sums = pooled.before.done_sums[:, None] + sums.cumsum(1)
        all_count = pooled.before.done_count[:, None] + count.cumsum(1)
        return _scale(sums, count), _scale(all_sums, all_count), all_count > 0

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
        return self.policy.flops()


def _scale(sums: Tensor, count: Tensor) -> Tensor:
    """Layer norm of a mean, without weights; zero where nothing was seen."""
    mean = sums / count.clamp(min=1)[..., None]
    return F.layer_norm(mean, mean.shape[-1:]) * (count > 0)[..., None]
