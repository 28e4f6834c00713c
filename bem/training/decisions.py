"""What a router saw at its decisions, each with what the oracle would have done there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bem.config import CloningConfig
from bem.routing.action import EXPERT, ActionSpace
from bem.routing.modes import mode
from bem.routing.mounted import Mounted
from bem.routing.router import Step
from bem.training.chunk_losses import chunk_numbers
from bem.training.data import Encoded, collate
from bem.training.hidden import run_up_to
from bem.training.traces import Traces, best_expert, target_actions

READ = ("input_ids", "attention_mask", "position_ids", "turn_starts", "evidence", "vision", "route")


@dataclass(frozen=True)
class Decisions:
    """Decisions of many conversations, one below the other."""

    observations: Float[Tensor, "n width"]
    targets: Int[Tensor, "n heads"]
    """The oracle's actions."""
    weights: Float[Tensor, "n heads"]
    """0 where a head's target means nothing."""
    q: Float[Tensor, "n options"]
    """Minus the least cost from here on under each expert option."""
    answers: Bool[Tensor, " n"]
    """An answer begins or goes on here."""
    conversation: Int[Tensor, " n"]

    @staticmethod
    def join(parts: Sequence[Decisions]) -> Decisions:
        """One after the other."""
        names = [field.name for field in fields(Decisions)]
        return Decisions(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})

    def select(self, rows: Tensor) -> Decisions:
        """Some of the decisions, by number or bool (n,)."""
        return Decisions(**{n: v[rows] for n, v in vars(self).items()})

    def of(self, conversations: Bool[Tensor, " rows"]) -> Decisions:
        """Those of some conversations."""
        return self.select(conversations[self.conversation.cpu()].to(self.conversation.device))

    def to(self, device: torch.device) -> Decisions:
        """On another device."""
        return Decisions(**{n: v.to(device) for n, v in vars(self).items()})

    def __len__(self) -> int:
        return len(self.targets)


class DecisionReader:
    """Reads traced conversations and notes what the router sees."""

    def __init__(
        self,
        mounted: Mounted,
        rows: Sequence[Encoded],
        traces: Traces,
        pad_id: int,
        config: CloningConfig,
        batch_size: int,
    ):
        self.mounted, self.rows, self.traces, self.pad_id = mounted, rows, traces, pad_id
        self.config, self.batch_size = config, batch_size
        self.space: ActionSpace = mounted.router.space
        self.targets = target_actions(traces, self.space, config.rank_cost, config.margin)
        self.order = sorted(range(len(rows)), key=lambda i: len(rows[i]))

    def oracle(self) -> Decisions:
        """Under the oracle's actions."""
        schedule = torch.from_numpy(_schedule(self.traces, self.targets, self.space))
        return Decisions.join([self._read(batch, schedule[batch]) for batch in self._batches()])

    def own(self) -> Decisions:
        """Under the router's own most likely actions."""
        return Decisions.join([self._read(batch, None) for batch in self._batches()])

    def _batches(self) -> list[list[int]]:
        size = self.batch_size
        return [self.order[i : i + size] for i in range(0, len(self.order), size)]

    @torch.no_grad()
    def _read(self, chosen: list[int], schedule: Tensor | None) -> Decisions:
        mounted, router = self.mounted, self.mounted.router
        batch = collate([self.rows[i] for i in chosen], self.pad_id)
        batch.pop("route", None)
        if schedule is not None:
            at = (chunk_numbers(batch, router.chunk_size) - 1).clamp(min=0)
            batch["route"] = schedule.gather(1, at[..., None].expand(-1, -1, 4))
        layer = mounted.router_config.router_layer
        assert layer is not None  # `mount` has filled it in
        with mode(mounted.model, training=False), router.watched() as tape:
            run_up_to(mounted.model, mounted.base, layer, batch, READ)
        steps = tape[: self.targets.shape[1]]  # there may be slots for more chunks than there are
        return Decisions.join([self._decisions(step, chosen, t) for t, step in enumerate(steps)])

    def _decisions(self, step: Step, chosen: list[int], chunk: int) -> Decisions:
        decided = torch.where(step.forced, True, ~step.allowed.hold) & step.real
        if bool(step.forced.any()):
            decided &= step.forced
        at = decided.cpu().nonzero()[:, 0]
        rows = [chosen[int(r)] for r in at]
        current = step.boundary.record[:, EXPERT].long().cpu()[at].tolist()
        targets = torch.from_numpy(self.targets[rows, chunk].copy()).reshape(-1, 4)
        weights = torch.ones(len(rows), 4)
        for k, (row, before) in enumerate(zip(rows, current, strict=True)):
            best = best_expert(self.traces, self.config.switch_cost, row, chunk, before)
            if chunk and best != targets[k, 0]:
                # off the oracle path only the expert target is valid
                targets[k, 0], weights[k, 1:] = best, 0.0
        q = -torch.from_numpy(self.traces.cost_to_go[rows, chunk].copy())
        return Decisions(
            step.observation.cpu()[at],
            targets,
            weights,
            q.reshape(len(rows), self.space.sizes[0]),
            torch.from_numpy(self.traces.answers[rows, chunk].copy()).reshape(-1),
            torch.tensor(rows, dtype=torch.long),
        )


def _schedule(traces: Traces, targets: np.ndarray, space: ActionSpace) -> np.ndarray:
    """The oracle's actions where it decides, -1 where a span goes on: (rows, chunks, 4)."""
    schedule = np.full_like(targets, -1)
    for row in range(len(traces)):
        t = 0
        while t < traces.chunks[row]:
            schedule[row, t] = targets[row, t]
            stop = t + space.spans[targets[row, t, 1]]
            t += 1
            while t < min(stop, traces.chunks[row]) and not traces.turns[row, t]:
                t += 1
    return schedule
