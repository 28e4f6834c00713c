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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bem.experiments.adapted import put_on
from bem.experiments.routing.skills import routed, unrouted
from bem.experiments.routing.stages import RoutingArtifacts
from bem.experts.subspace import interference
from bem.routing.mount import mount
from bem.routing.mounted import Mounted
from bem.training.data import Example
from bem.training.row_losses import answer_losses

ROWS = 40
"""Held-out conversations per expert."""
LIMIT = 0.02

Losses = dict[str, float]
"""Expert -> mean loss on its own rows."""


def interference_of(
    artifacts: RoutingArtifacts, router: Path, limit: float = LIMIT
) -> dict[str, Any]:
    """Measure all three losses; `router` is the folder of the router that routes.

    Returns:
        `limit`, and for "mounted" and "routed" the losses of each expert and whether all passed.
    """
    rows = {
        name: own
        for option, name in enumerate(artifacts.skills.experts, 1)
        if (own := _rows_of(artifacts, option))
    }
    with artifacts.mounted(router) as mounted:
        beside, chosen = _together(artifacts, mounted, rows)
        experts, config = list(mounted.experts), mounted.router_config
    alone: Losses = {}
    for name, own in rows.items():
        few = [expert for expert in experts if expert.name in (name, config.shared)]
        changes = {
            "fallback": config.fallback if config.fallback == name else None,
            "orthogonal": False,  # they are trained: nothing to reserve
        }
        single = config.model_copy(update=changes)
        with put_on(artifacts.model, lambda base, f=few, c=single: mount(base, f, c)) as mounted:
            option = artifacts.skills.experts.index(name) + 1
            alone[name] = _loss(artifacts, mounted, _own(artifacts, own, option, 1))
    facts: dict[str, Any] = {"limit": limit}
    for kind, losses in (("mounted", beside), ("routed", chosen)):
        compared = interference(alone, losses, limit)
        experts_rows = [{**asdict(loss), "growth": loss.growth} for loss in compared.losses]
        facts[kind] = {"passed": compared.passed, "experts": experts_rows}
    return facts


def _together(
    artifacts: RoutingArtifacts, mounted: Mounted, rows: dict[str, list[Example]]
) -> tuple[Losses, Losses]:
    """Losses with all experts mounted: under the makers' labels, and as the router chooses."""
    beside: Losses = {}
    chosen: Losses = {}
    for name, own in rows.items():
        option = mounted.router.space.option(name)
        beside[name] = _loss(artifacts, mounted, _own(artifacts, own, option, option))
        chosen[name] = _loss(artifacts, mounted, [unrouted(row) for row in own])
    return beside, chosen


def _rows_of(artifacts: RoutingArtifacts, option: int) -> list[Example]:
    """Held-out conversations whose last turn belongs to an expert."""
    rows = artifacts.held_out
    return [row for row in rows if artifacts.skills.route(row)[-1] == option][:ROWS]


def _own(
    artifacts: RoutingArtifacts, rows: Sequence[Example], own: int, option: int
) -> list[Example]:
    """Turns of an expert under `option`, all other turns under the base."""
    routes = [[option * (o == own) for o in artifacts.skills.route(row)] for row in rows]
    return routed(rows, routes)


def _loss(artifacts: RoutingArtifacts, mounted: Mounted, rows: Sequence[Example]) -> float:
    """Mean over the rows of their last answer's loss."""
    encoded = [artifacts.encoded(row) for row in rows]
    size, pad_id = artifacts.config.eval_batch_size, artifacts.inputs.pad_id
    losses: list[float] = []
    for at in range(0, len(encoded), size):
        losses += answer_losses(mounted, encoded[at : at + size], pad_id)[0]
    return float(np.mean(losses))
