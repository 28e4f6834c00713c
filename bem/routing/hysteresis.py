"""What the router may do at a chunk boundary: hysteresis, spans, plans and the flip budget as masks.

All of it is part of the decision process: an option that a rule forbids has probability 0, so that
what is drawn is what is executed, and its log-probability is exact.

    leave expert e for f only if   Q(s, f) - Q(s, e) > switch_cost + hysteresis
    a span runs to its end; a turn start ends it and begins a new plan
    a plan holds at most `plan_length` different actions; the last one then holds
    flips <= flip_burst + flip_rate_max * chunks      (a token bucket)

Q comes from a critic that does not change while a batch is collected and a policy step is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bem.routing.action import (
    EXPERT,
    FADE,
    FADE_STEPS,
    FLIPS,
    PLAN,
    RANK,
    SPAN_LEFT,
    STRENGTH,
    TURN,
    ActionSpace,
    one_hot,
)


@dataclass(frozen=True)
class Boundary:
    """One chunk boundary of every row of a batch, before anything is chosen."""

    record: Tensor  # (batch, RECORD): after the chunk before
    number: Tensor  # int (batch,): of the chunk that begins, from 1
    turn: Tensor  # bool (batch,): it begins a turn
    q: Tensor  # (batch, experts + 1): value of each expert option


@dataclass(frozen=True)
class Limits:
    """See `RouterConfig`, whose fields these are."""

    switch_cost: float
    hysteresis: float
    plan_length: int
    flip_rate_max: float
    flip_burst: int


@dataclass(frozen=True)
class Allowed:
    """What may be chosen, and why not more."""

    masks: tuple[Tensor, ...]  # bool (batch, n_h) of each head
    hold: Tensor  # bool (batch,): the action before goes on
    running: Tensor  # bool (batch,): ... because its span is not over
    full: Tensor  # bool (batch,): ... because the plan is full
    spent: Tensor  # bool (batch,): no change of expert: the flip budget is spent
    sticky: Tensor  # bool (batch,): hysteresis forbids an expert that is there


def allowed(at: Boundary, space: ActionSpace, limits: Limits, available: Tensor) -> Allowed:
    """The masks of a boundary.

    Args:
        available: bool (experts + 1,), False for an expert that was unloaded.
    """
    record, first = at.record, at.number == 1
    current = record[:, EXPERT].long()
    there = available[current]
    fresh = at.turn | first
    running = in_span(at, available)
    full = (record[:, PLAN] >= limits.plan_length) & ~fresh & there & ~running
    budget = limits.flip_burst + limits.flip_rate_max * at.number
    spent = (record[:, FLIPS] + 1 > budget) & there & ~first
    hold = running | full
    own = one_hot(current, len(available))
    gain = at.q - at.q.gather(1, current[:, None])
    worth = gain > limits.switch_cost + limits.hysteresis
    free = (first | ~there)[:, None]  # there is nothing to stay with
    experts = available & (worth | own | free)
    sticky = (available & ~experts).any(1) & ~hold & ~spent
    experts = torch.where((hold | spent)[:, None], own, experts)
    _, spans, ranks, strengths = space.sizes
    held = hold[:, None]
    masks = (
        experts,
        torch.where(held, one_hot(torch.zeros_like(current), spans), True),
        torch.where(held, one_hot(record[:, RANK].long(), ranks), True),
        torch.where(held, one_hot(record[:, STRENGTH].long(), strengths), True),
    )
    return Allowed(masks, hold, running, full, spent, sticky)


def in_span(at: Boundary, available: Tensor) -> Tensor:
    """Bool (batch,): the span of the action before is not over, so that nothing can be chosen."""
    there = available[at.record[:, EXPERT].long()]
    return (at.record[:, SPAN_LEFT] > 0) & ~at.turn & (at.number != 1) & there


def execute(at: Boundary, action: Tensor, hold: Tensor, fade: Tensor, space: ActionSpace) -> Tensor:
    """The record (batch, RECORD) after an action was taken.

    Args:
        action: int (batch, 4).
        hold: bool (batch,), the action before simply goes on.
        fade: (batch,), share that lacks confidence, in FADE_STEPS-ths; of a held action the old one.
    """
    before, first = at.record, at.number == 1
    fresh = at.turn | first
    kept = before[:, [EXPERT, RANK, STRENGTH]]
    options = torch.where(hold[:, None], kept, action[:, [0, 2, 3]].to(before.dtype))
    changed = options[:, 0] != before[:, EXPERT]
    different = (options != kept).any(1)
    spans = torch.tensor(space.spans, device=action.device)[action[:, 1]]
    left = torch.where(hold, (before[:, SPAN_LEFT] - 1).clamp(min=0), spans - 1.0)
    plan = torch.where(fresh, 1.0, before[:, PLAN] + different)
    record = torch.empty_like(before)
    record[:, EXPERT], record[:, RANK], record[:, STRENGTH] = options.unbind(1)
    record[:, SPAN_LEFT] = left
    record[:, PLAN] = plan
    record[:, FLIPS] = before[:, FLIPS] + (changed & ~first)
    record[:, FADE] = torch.where(hold, before[:, FADE], fade)
    record[:, TURN] = before[:, TURN] + at.turn
    return record


def fade_of(probability: Tensor, threshold: float) -> Tensor:
    """16ths that an expert's gate gives up: 0 at or above `threshold`, rising to all at probability 0.

    Rounded up, so that equal decisions are equal to the bit.
    """
    if threshold == 0:
        return torch.zeros_like(probability)
    return (FADE_STEPS * (1 - probability / threshold).clamp(min=0.0)).ceil()


__all__ = ["Allowed", "Boundary", "Limits", "allowed", "execute", "fade_of", "in_span"]
