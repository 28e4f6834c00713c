"""How well a router chooses on rows that it was not fitted to, beside the plain ways to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bem.routing.action import EXPERT
from bem.routing.modes import mode
from bem.routing.mounted import Mounted
from bem.stats.bootstrap import bca_bootstrap
from bem.stats.shares import wilson
from bem.training.chunk_losses import Floats, LossReader
from bem.training.data import Encoded, collate
from bem.training.decisions import READ
from bem.training.hidden import run_up_to
from bem.training.router_targets import UNKNOWN, Targets, per_turn

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval at 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """Of one way to choose, on the held-out rows."""

    name: str
    reads: str
    """Which hidden states it goes by."""
    accuracy: Estimate
    """Share of turns with the right expert (Wilson's interval)."""
    of_skill: dict[str, float]
    """The same of the turns of each expert."""
    regret: Estimate | None
    """Nats per answer token beyond the best expert's of each turn, whoever answers throughout (BCa, rows as
    units). None: no row has an answer."""
    flip_rate: float | None
    """Changes of expert per chunk boundary behind the first answer's start. None: no row goes on."""
    lead: Estimate | None = None
    """Accuracy of the fitted router minus this one's (BCa, rows as units); None: it is the router."""
    regret_lead: Estimate | None = None
    """Regret of this one minus the fitted router's: above 0, the router is better."""

    @property
    def is_better(self) -> bool:
        """Clearly better than the fitted router: an interval lies on its side, and none on the other."""
        leads = [lead for lead in (self.lead, self.regret_lead) if lead is not None]
        return any(lead.high < 0 for lead in leads) and not any(lead.low > 0 for lead in leads)


def router_path(
    mounted: Mounted, rows: Sequence[Encoded], pad_id: int, batch_size: int
) -> list[Ints]:
    """Expert option that the router takes in each chunk of each row."""
    layer = mounted.router_config.router_layer
    assert layer is not None  # `mount` has filled it in
    paths: list[Ints] = [np.empty(0, np.int64)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(rows), batch_size):
        chosen = order[at : at + batch_size]
        batch = collate([rows[i] for i in chosen], pad_id)
        batch.pop("route", None)
        with mode(mounted.model, training=False), mounted.router.watched() as tape:
            run_up_to(mounted.model, mounted.base, layer, batch, READ)
        options = torch.stack([step.record[:, EXPERT] for step in tape], 1).long().cpu().numpy()
        real = torch.stack([step.real for step in tape], 1).cpu().numpy()
        for r, i in enumerate(chosen):
            paths[i] = options[r, real[r]]
    return paths


def at_turns(paths: Sequence[Ints], starts: Ints) -> Ints:
    """The option of each turn (rows, turns), UNKNOWN where there is no such turn."""
    found = np.full(starts.shape, UNKNOWN)
    for i, path in enumerate(paths):
        turns = starts[i] > 0
        found[i, turns] = path[starts[i, turns] - 1]
    return found


def path_of(choices: Ints, starts: Ints) -> list[Ints]:
    """Option of each chunk where nothing but a turn's start changes it; the bare base comes first."""
    paths = []
    for choice, start in zip(choices, starts, strict=True):
        path = np.zeros(start.max(), np.int64)
        for option, first in zip(choice, start, strict=True):
            if first:
                path[first - 1 :] = option
        paths.append(path)
    return paths


def score(
    name: str,
    reads: str,
    choices: Ints,
    paths: Sequence[Ints],
    targets: Targets,
    options: Sequence[str],
    router: Ints | None = None,
) -> Score:
    """Compare choices with what is right.

    Args:
        choices: option of each turn (rows, turns).
        paths: of each chunk of each row.
        options: names.
        router: the fitted router's choices, to be compared with; None: these are they.
    """
    known = targets.best != UNKNOWN
    right = (choices == targets.best)[known].astype(float)
    best, row = targets.best[known], known.nonzero()[0]
    of_skill = {str(options[o]): float(right[best == o].mean()) for o in sorted(set(best.tolist()))}
    accuracy = Estimate(float(right.mean()), *wilson(float(right.sum()), len(right)))
    lost, measured = _lost(choices, targets)
    routed = [path[start[0] - 1 :] for path, start in zip(paths, targets.starts, strict=True)]
    flips = sum(int((path[1:] != path[:-1]).sum()) for path in routed)
    boundaries = sum(len(path) - 1 for path in routed)
    found = Score(
        name, reads, accuracy, of_skill,
        _mean(lost, measured.nonzero()[0]) if len(lost) else None,
        flips / boundaries if boundaries else None,
    )  # fmt: skip
    if router is None:
        return found
    lead = _mean((router == targets.best)[known].astype(float) - right, row)
    regret_lead = None
    if len(lost):
        regret_lead = _mean(lost - _lost(router, targets)[0], measured.nonzero()[0])
    return Score(**{**vars(found), "lead": lead, "regret_lead": regret_lead})


def _lost(choices: Ints, targets: Targets) -> tuple[Floats, NDArray[np.bool_]]:
    """Regret of every turn whose losses were measured, and which they are (rows, turns)."""
    measured = ~np.isnan(targets.losses).any(-1) & (choices != UNKNOWN)
    losses, chosen = targets.losses[measured], choices[measured]
    return losses[np.arange(len(losses)), chosen] - losses.min(-1), measured


def _mean(values: Floats, rows: Ints) -> Estimate:
    bca = bca_bootstrap(values, clusters=rows.tolist())
    return Estimate(bca.observed, bca.lower, bca.upper)


def regret_as_it_acts(
    mounted: Mounted,
    rows: Sequence[Encoded],
    losses: Sequence[Floats],
    pad_id: int,
    batch_size: int,
) -> Estimate:
    """Nats per answer token of whole forward passes under the router's own route, beyond the best expert's.

    Other experts, or none, have read the turns before an expert answers: `Score.regret` leaves that out.

    Args:
        rows: with their answers.
        losses: of each row (turns, options), as in `turn_losses`.
    """
    paths = router_path(mounted, rows, pad_id, batch_size)
    reader = LossReader(mounted, rows, pad_id, batch_size, lambda: None)
    route = np.zeros(reader.shape, np.int64)
    for i, path in enumerate(paths):
        route[i, : len(path)] = path
    acted = reader.losses(route, None, None)
    lost, at = [], []
    for i, of_turn in enumerate(losses):
        beyond = per_turn(acted[i], reader.turns[i]) - of_turn.min(-1)
        lost += beyond.tolist()
        at += [i] * len(beyond)
    return _mean(np.array(lost), np.array(at))
