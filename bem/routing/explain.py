"""What the router does with a text, and why: one entry per chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bem.control.chunks import chunk_starts
from bem.routing.action import EXPERT, FADE, FADE_STEPS, RANK, SPAN_LEFT, STRENGTH
from bem.routing.modes import mode
from bem.routing.mounted import Mounted
from bem.routing.router import Step


@dataclass(frozen=True)
class Explained:
    """The action that governs one chunk."""

    chunk: int
    """From 1."""
    start: int
    """Its first token."""
    stop: int
    """The token behind its last."""
    turn: bool
    """It begins a turn."""
    expert: str
    rank: int
    """Rank budget at each site."""
    strength: float
    chunks_left: int
    """Chunks for which the action holds after this one."""
    fade: float
    """Share of the gate given up for lack of confidence."""
    why: str
    probabilities: dict[str, float]
    """The policy's probability of every loaded expert, before any rule."""
    gain: float
    """Q of the best expert minus Q of the one that was in force before."""


@torch.no_grad()
def explain(mounted: Mounted, ids: Sequence[int], turn_starts: Sequence[bool]) -> list[Explained]:
    """Read one text and say what the router does in each chunk.

    Args:
        ids: token ids.
        turn_starts: True at the token that predicts the first token of an answer.
    """
    device, router = mounted.base.device, mounted.router
    tokens = torch.tensor([list(ids)], device=device)
    turns = torch.tensor([list(turn_starts)], device=device)
    with mode(mounted.model, training=False), router.watched() as tape:
        mounted.model(input_ids=tokens, turn_starts=turns, use_cache=False)
    return explained(mounted, tape, 0, turn_starts)


def explained(
    mounted: Mounted, tape: Sequence[Step], row: int, turn_starts: Sequence[bool]
) -> list[Explained]:
    """Of one row of a batch that was read from its first token on.

    Args:
        tape: what was noted while the batch was read (`AgenticRouter.watched`).
        turn_starts: of the row's tokens.
    """
    turns = torch.tensor([list(turn_starts)])
    valid, nothing = torch.ones_like(turns), torch.zeros(1, dtype=torch.long)
    size = mounted.router.chunk_size
    starts = chunk_starts(valid, turns, nothing, size)[0].nonzero()[:, 0].tolist()
    ends = [*starts[1:], len(turn_starts)]
    steps = [step for step in tape if bool(step.real[row])]
    return [
        _explained(mounted, step, row, start, stop)
        for step, start, stop in zip(steps, starts, ends, strict=True)
    ]


def _explained(mounted: Mounted, step: Step, row: int, start: int, stop: int) -> Explained:
    router, record = mounted.router, step.record[row]
    space = router.space
    probabilities = _expert_logits(mounted, step, row).softmax(-1).tolist()
    before = int(step.boundary.record[row, EXPERT])
    q = step.boundary.q[row]
    return Explained(
        chunk=int(step.boundary.number[row]),
        start=start,
        stop=stop,
        turn=bool(step.boundary.turn[row]),
        expert=space.name(int(record[EXPERT])),
        rank=space.ranks[int(record[RANK])],
        strength=space.strengths[int(record[STRENGTH])],
        chunks_left=int(record[SPAN_LEFT]),
        fade=float(record[FADE]) / FADE_STEPS,
        why=_why(mounted, step, row, before),
        probabilities={
            space.name(o): p for o, p in enumerate(probabilities) if bool(router.available[o])
        },
        gain=float(q.max() - q[before]),
    )


def _why(mounted: Mounted, step: Step, row: int, before: int) -> str:
    space, limits, rules = mounted.router.space, mounted.router.limits, step.allowed
    now = int(step.record[row, EXPERT])
    if not mounted.router.trained:
        return "the router is not trained: the bare base answers"
    q = step.boundary.q[row]
    threshold = limits.switch_cost + limits.hysteresis
    if bool(rules.running[row]):
        return "the span of the action before goes on"
    if bool(rules.full[row]):
        return f"the plan holds its {limits.plan_length} actions: the last one goes on"
    if not bool(mounted.router.available[before]):
        return f"{space.name(before)} was unloaded"
    if bool(rules.spent[row]):
        return "the budget of expert changes is spent"
    if int(step.boundary.number[row]) == 1:
        return "the conversation begins: nothing was read yet"
    if now != before:
        return f"Q of {space.name(now)} is {q[now] - q[before]:.2f} above {space.name(before)}, needs {threshold:.2f}"
    best = int(q.argmax())
    if best != now and not bool(rules.masks[0][row, best]):
        return f"hysteresis: {space.name(best)} is {q[best] - q[now]:.2f} better, needs {threshold:.2f}"
    preferred = _preferred(mounted, step, row)
    if preferred != now and not bool(rules.masks[0][row, preferred]):
        return (
            f"hysteresis: the policy prefers {space.name(preferred)}, whose Q is {q[preferred] - q[now]:+.2f}, "
            f"needs {threshold:.2f}"
        )
    return "the policy prefers what is in force"


def _preferred(mounted: Mounted, step: Step, row: int) -> int:
    """The policy's most likely expert of those that are loaded, before any other rule."""
    return int(_expert_logits(mounted, step, row).argmax())


def _expert_logits(mounted: Mounted, step: Step, row: int) -> Float[Tensor, " options"]:
    """Of every expert option; -inf for one that was unloaded."""
    logits = mounted.router.policy.actor.logits(step.observation[row])[0]
    return logits.masked_fill(~mounted.router.available, -torch.inf)
