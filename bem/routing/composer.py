"""The control of every site for what was decided, remembered: routers choose among few actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bem.experts.compose import TrustRegion
from bem.routing.action import EXPERT, FADE, RANK, STRENGTH, ActionSpace, constant
from bem.variants.watch import Watch

REMEMBERED = 256  # actions


class Composer:
    """Composes the sites' experts once for each action, until a weight or a setting changes."""

    def __init__(self) -> None:
        self._watch, self._setting = Watch(), None
        self._known: dict[bytes, Tensor] = {}

    def __call__(
        self,
        members: Sequence[Any],
        records: Tensor,
        space: ActionSpace,
        fallback: int,
        region: TrustRegion | None,
    ) -> Tensor:
        """Controls of all sites side by side (..., width), float32.

        Args:
            members: the `ExpertStack` of each site.
            records: (..., RECORD) of each chunk, after its decision.
            fallback: see `ActionSpace.decision`.
        """
        flat = records.flatten(0, -2)
        self._forget(members, (space, fallback, region, [m.weight_norm for m in members]))
        decided = flat[:, constant((EXPERT, RANK, STRENGTH, FADE), flat.device)]
        names = [row.tobytes() for row in decided.cpu().numpy()]
        new = {name: i for i, name in enumerate(names) if name not in self._known}
        if new:
            decision = space.decision(flat[list(new.values())], fallback)
            made = torch.cat([member.compose(decision, region) for member in members], -1)
            self._known.update((name, row.clone()) for name, row in zip(new, made, strict=True))
        return torch.stack([self._known[name] for name in names]).unflatten(0, records.shape[:-1])

    def _forget(self, members: Sequence[Any], setting: Any) -> None:
        changed = self._watch.changed(*(t for m in members for t in (m.u, m.v, m.importance)))
        if changed or setting != self._setting or len(self._known) > REMEMBERED:
            self._known, self._setting = {}, setting
