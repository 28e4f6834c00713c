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

from bem.config import RouterConfig
from bem.errors import CheckpointError
from bem.experiments.adapted import put_on
from bem.experiments.routing.skills import routed, unrouted
from bem.experiments.routing.stages import RoutingArtifacts
from bem.experts.expert import Expert
from bem.experts.subspace import interference
from bem.files import made_under, read_json, sha256_file, sha256_json, write_json
from bem.routing.mount import mount
from bem.routing.mounted import Mounted
from bem.training.data import Example, data_hash
from bem.training.row_losses import answer_losses

ROWS = 20
"""Held-out conversations per expert."""
LIMIT = 0.02

Losses = dict[str, float]
"""Expert -> mean loss on its own rows."""
Rows = dict[str, list[Example]]
"""Expert -> held-out conversations whose last turn is its own."""


def interference_of(
    artifacts: RoutingArtifacts, router: Path, limit: float = LIMIT
) -> dict[str, Any]:
    """Measure all three losses; `router` is the folder of the router that routes.

    What does not depend on the router is measured once for all routers over the same experts.

    Returns:
        `limit`, and for "mounted" and "routed" the losses of each expert and whether all passed.
    """
    rows = {
        name: own
        for option, name in enumerate(artifacts.skills.experts, 1)
        if (own := _rows_of(artifacts, option))
    }
    alone, beside = _without_router(artifacts, rows)
    with artifacts.mounted(router) as mounted:
        chosen = {
            name: _loss(artifacts, mounted, [unrouted(row) for row in own])
            for name, own in rows.items()
        }
    facts: dict[str, Any] = {"limit": limit}
    for kind, losses in (("mounted", beside), ("routed", chosen)):
        compared = interference(alone, losses, limit)
        experts_rows = [{**asdict(loss), "growth": loss.growth} for loss in compared.losses]
        facts[kind] = {"passed": compared.passed, "experts": experts_rows}
    return facts


def _without_router(artifacts: RoutingArtifacts, rows: Rows) -> tuple[Losses, Losses]:
    """(alone, mounted under the makers' labels); kept beside the experts."""
    folder = artifacts.experts()
    parts = [sha256_file(folder / "manifest.json"), *(data_hash(own) for own in rows.values())]
    key, kept = sha256_json(parts), artifacts.folder / "interference.json"
    if made_under(kept, key):
        content = read_json(kept, CheckpointError)
        return content["alone"], content["mounted"]
    with artifacts.mounted(folder) as mounted:
        beside = {
            name: _loss(artifacts, mounted, _own(artifacts, own, option, option))
            for name, own in rows.items()
            for option in [mounted.router.space.option(name)]
        }
        experts, config = list(mounted.experts), mounted.router_config
    alone = {name: _alone(artifacts, name, own, experts, config) for name, own in rows.items()}
    write_json(kept, {"key": key, "alone": alone, "mounted": beside})
    return alone, beside


def _alone(
    artifacts: RoutingArtifacts,
    name: str,
    own: Sequence[Example],
    experts: Sequence[Expert],
    config: RouterConfig,
) -> float:
    """Loss of one expert on its own rows with nothing else mounted but the shared one."""
    few = [expert for expert in experts if expert.name in (name, config.shared)]
    changes = {
        "fallback": config.fallback if config.fallback == name else None,
        "orthogonal": False,  # they are trained: nothing to reserve
    }
    single = config.model_copy(update=changes)
    with put_on(artifacts.model, lambda base: mount(base, few, single)) as mounted:
        option = artifacts.skills.experts.index(name) + 1
        return _loss(artifacts, mounted, _own(artifacts, own, option, 1))


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
