"""What each expert loses on its own skills when the others are mounted beside it, measured.

Three losses of every expert on the held-out answers of its own skills, all in nats per token:

    alone     nothing else is mounted (but the shared expert, if there is one)
    mounted   all experts are mounted, and each turn is given to this one where it is its own
    routed    all are mounted, and the router chooses

`mounted` against `alone` shows whether experts disturb each other by being there; `routed` against
`alone` is what a user gets of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bem.experiments.measuring.answers import answer_losses
from bem.experts.subspace import interference
from bem.routing.mount import mount
from bem.routing.mounted import Mounted
from bem.training.data import Encoded, Example, encode

if TYPE_CHECKING:
    from bem.experiments.routing.stages import Stages

ROWS = 40
"""Held-out conversations per expert."""
LIMIT = 0.02


def interference_of(stages: Stages, router: Path, limit: float = LIMIT) -> dict[str, Any]:
    """Measure all three losses; `router` is the folder of the router that routes.

    Returns:
        `limit`, and for "mounted" and "routed" the losses of each expert and whether all passed.
    """
    mine = {name: _rows_of(stages, option) for option, name in enumerate(stages.skills.experts, 1)}
    mine = {name: rows for name, rows in mine.items() if rows}
    losses: dict[str, dict[str, float]] = {"alone": {}, "mounted": {}, "routed": {}}
    with stages.mounted(router) as mounted:
        everyone, config = list(mounted.experts), mounted.router_config
        for name, rows in mine.items():
            option = mounted.router.space.option(name)
            losses["mounted"][name] = _loss(stages, mounted, _own(stages, rows, option, option))
            losses["routed"][name] = _loss(stages, mounted, [_plain(row) for row in rows])
    for name, rows in mine.items():
        few = [e for e in everyone if e.name in (name, config.shared)]
        fallback = config.fallback if config.fallback == name else None
        changes = {
            "fallback": fallback,
            "orthogonal": False,
        }  # they are trained: nothing to reserve
        alone = mount(stages.model, few, config.model_copy(update=changes))
        try:
            option = stages.skills.experts.index(name) + 1
            losses["alone"][name] = _loss(stages, alone, _own(stages, rows, option, 1))
        finally:
            stages.model = alone.detach()
    found: dict[str, Any] = {"limit": limit}
    for kind in ("mounted", "routed"):
        report = interference(losses["alone"], losses[kind], limit)
        rows = [{**asdict(loss), "growth": loss.growth} for loss in report.losses]
        found[kind] = {"passed": report.passed, "experts": rows}
    return found


def _rows_of(stages: Stages, option: int) -> list[Example]:
    """Held-out conversations whose last turn belongs to an expert."""
    rows = [row for task in stages.tasks for row in task.dev]
    return [row for row in rows if stages.skills.route(row)[-1] == option][:ROWS]


def _own(stages: Stages, rows: Sequence[Example], own: int, option: int) -> list[Example]:
    """Turns of an expert under `option`, all other turns under the base."""
    return [
        replace(
            row,
            meta={**row.meta, "route": [option * (o == own) for o in stages.skills.route(row)]},
        )
        for row in rows
    ]


def _plain(row: Example) -> Example:
    return replace(row, meta={**row.meta, "route": None})


def _loss(stages: Stages, mounted: Mounted, rows: Sequence[Example]) -> float:
    """Mean over the rows of their last answer's loss."""
    encoded: list[Encoded] = [encode(row, stages.tokenizer, stages.room) for row in rows]
    size = stages.config.eval_batch_size
    losses: list[float] = []
    for at in range(0, len(encoded), size):
        losses += answer_losses(mounted, encoded[at : at + size], stages.pad_id)[0]
    return float(np.mean(losses))
