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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bem.routing.action import (
    EXPERT,
    FADE,
    FADE_STEPS,
    FLIPS,
    PLAN,
    RANK,
    RECORD,
    SPAN_LEFT,
    STRENGTH,
    TURN,
    ActionSpace,
    constant,
)


@dataclass(frozen=True)
class Boundary:
    """One chunk boundary of every row of a batch, before anything is chosen."""

    record: Float[Tensor, "batch columns"]
    """After the chunk before."""
    number: Int[Tensor, " batch"]
    """Of the chunk that begins, from 1."""
    turn: Bool[Tensor, " batch"]
    """It begins a turn."""
    q: Tensor
    """Value of each expert option (batch, options); empty where a route was given."""


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

    possible: Bool[Tensor, "batch options"]
    """Options of all heads, side by side."""
    in_force: Bool[Tensor, "batch options"]
    """The options of the action before."""
    sizes: tuple[int, ...]
    """Options of each head."""
    hold: Bool[Tensor, " batch"]
    """The action before goes on ..."""
    running: Bool[Tensor, " batch"]
    """... because its span is not over ..."""
    full: Bool[Tensor, " batch"]
    """... or because the plan is full."""
    spent: Bool[Tensor, " batch"]
    """No change of expert: the flip budget is spent."""

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """Bool (batch, n_h) of each head."""
        return self.possible.split(self.sizes, 1)


def allowed(
    at: Boundary, space: ActionSpace, limits: Limits, available: Bool[Tensor, " experts"]
) -> Allowed:
    """The masks of a boundary.

    Args:
        available: of each expert option; False for an expert that was unloaded.
    """
    record, first = at.record, at.number == 1
    current = record[:, EXPERT].long()
    stays = available[current] & ~first  # there is something to stay with
    goes_on = stays & ~at.turn
    running = in_span(at, available)
    full = (record[:, PLAN] >= limits.plan_length) & goes_on & ~running
    budget = limits.flip_burst + limits.flip_rate_max * at.number
    spent = (record[:, FLIPS] + 1 > budget) & stays
    hold = running | full
    in_force = space.in_force(record)
    own, rest = in_force.split([len(available), sum(space.sizes[1:])], 1)
    gain = at.q - at.q.gather(1, current[:, None])
    worth = (gain > limits.switch_cost + limits.hysteresis) | ~stays[:, None]
    experts = available & (own | (worth & ~(hold | spent)[:, None]))
    possible = torch.cat([experts, rest | ~hold[:, None]], 1)
    return Allowed(possible, in_force, space.sizes, hold, running, full, spent)


def in_span(at: Boundary, available: Bool[Tensor, " experts"]) -> Bool[Tensor, " batch"]:
    """The span of the action before is not over, so that nothing can be chosen."""
    loaded = available[at.record[:, EXPERT].long()]
    return (at.record[:, SPAN_LEFT] > 0) & ~at.turn & (at.number != 1) & loaded


def go_on(record: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch columns"]:
    """`execute` where every row is inside a span: one chunk of it has passed."""
    passed = tuple(float(column == SPAN_LEFT) for column in range(RECORD))
    return record - constant(passed, record.device)


def execute(
    at: Boundary,
    action: Int[Tensor, "batch heads"],
    hold: Bool[Tensor, " batch"],
    fade: Float[Tensor, " batch"],
    space: ActionSpace,
) -> Float[Tensor, "batch columns"]:
    """The record after an action was taken.

    Args:
        hold: the action before simply goes on.
        fade: share that lacks confidence, in FADE_STEPS-ths; of a held action the old one.
    """
    first, columns = at.number == 1, at.record.unbind(1)
    options = [
        torch.where(hold, columns[column], action[:, head].to(columns[column].dtype))
        for column, head in ((EXPERT, 0), (RANK, 2), (STRENGTH, 3))
    ]
    changed = options[0] != columns[EXPERT]
    different = changed | (options[1] != columns[RANK]) | (options[2] != columns[STRENGTH])
    spans = constant(space.spans, action.device)[action[:, 1]]
    record = [columns[0]] * len(columns)
    record[EXPERT], record[RANK], record[STRENGTH] = options
    record[SPAN_LEFT] = torch.where(hold, columns[SPAN_LEFT] - 1, spans - 1).clamp(min=0)
    record[PLAN] = torch.where(at.turn | first, 1.0, columns[PLAN] + different)
    record[FLIPS] = columns[FLIPS] + (changed & ~first)
    record[FADE] = torch.where(hold, columns[FADE], fade)
    record[TURN] = columns[TURN] + at.turn
    return torch.stack(record, 1)


def fade_of(probability: Float[Tensor, "*batch"], threshold: float) -> Float[Tensor, "*batch"]:
    """16ths that an expert's gate gives up: 0 at or above `threshold`, rising to all at probability 0.

    Rounded up, so that equal decisions are equal to the bit.
    """
    if threshold == 0:
        return torch.zeros_like(probability)
    return (FADE_STEPS * (1 - probability / threshold).clamp(min=0.0)).ceil()
