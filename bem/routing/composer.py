"""The control of every site for what was decided.

A router chooses among few actions, so that what they mean for a set of weights is composed once, for
all of them, and then looked up: at a chunk boundary nothing is computed but an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bem.experts.compose import Decision, TrustRegion
from bem.experts.slab import SitePack
from bem.routing.action import EXPERT, FADE, FADE_STEPS, RANK, RECORD, STRENGTH, ActionSpace
from bem.routing.hysteresis import Limits

SMALL = (
    1 << 20
)  # numbers in a table of all actions that is always made; a larger one if the slabs are
ROWS_AT_ONCE = 256  # actions composed together
TABLES_KEPT = 4


@dataclass(frozen=True)
class Rules:
    """What a router may do and what becomes of it, beside its policy; see `RouterConfig`."""

    space: ActionSpace
    limits: Limits
    chunk_size: int = 64
    confidence: float = 0.0
    fallback: int = 0
    """Expert option that takes what a faded gate gives up; 0: nothing does."""
    region: TrustRegion | None = None

    @property
    def most(self) -> int:
        """Experts on at once, at most."""
        return 1 + int(self.space.shared) + int(self.confidence > 0 and self.fallback > 0)

    @property
    def fades(self) -> int:
        """Different fades of a gate."""
        return FADE_STEPS + 1 if self.confidence > 0 else 1

    @property
    def actions(self) -> int:
        """Different decisions."""
        experts, _, ranks, strengths = self.space.sizes
        return experts * ranks * strengths * self.fades

    def tabled(self, width: int, weights: int) -> bool:
        """Are all actions composed beforehand, for stacks of so many ranks and weights together?"""
        return self.actions * width <= max(SMALL, weights)

    def decision(self, records: Float[Tensor, "*chunks record"]) -> Decision:
        """What records mean for the stacks."""
        return replace(self.space.decision(records, self.fallback), most=self.most)

    def index(self, records: Float[Tensor, "*chunks record"]) -> Tensor:
        """Row of `all_records` that means the same."""
        _, _, ranks, strengths = self.space.sizes
        expert, rank, strength, fade = (
            records[..., column].long() for column in (EXPERT, RANK, STRENGTH, FADE)
        )
        return ((expert * ranks + rank) * strengths + strength) * self.fades + fade

    def all_records(self, device: torch.device) -> Float[Tensor, "actions record"]:
        """A record for every decision."""
        experts, _, ranks, strengths = self.space.sizes
        options = [torch.arange(n, device=device) for n in (experts, ranks, strengths, self.fades)]
        records = torch.zeros(self.actions, RECORD, device=device)
        records[:, [EXPERT, RANK, STRENGTH, FADE]] = torch.cartesian_prod(*options).float()
        return records


class Composer:
    """Composes the sites' experts for what was decided."""

    def __init__(self) -> None:
        self._tables: list[tuple[tuple[SitePack, ...], Rules, Tensor]] = []

    def __call__(
        self,
        members: Sequence[SitePack],
        records: Float[Tensor, "*chunks record"],
        rules: Rules,
    ) -> Float[Tensor, "*chunks width"]:
        """Controls of all sites side by side, float64.

        Args:
            members: the experts of each site, in the dtype that computes.
            records: of each chunk, after its decision.
        """
        width = sum(m.control_width for m in members)
        weights = sum(m.v.numel() + m.rows_of_u.numel() for m in members)
        if not all(m.lasting for m in members) or not rules.tabled(width, weights):
            return _composed(members, records, rules)
        table, row = self._table(tuple(members), rules), rules.index(records)
        return table.index_select(0, row.flatten()).double().unflatten(0, row.shape)

    def _table(self, members: tuple[SitePack, ...], rules: Rules) -> Tensor:
        for others, their_rules, table in self._tables:
            same = len(others) == len(members) and all(map(_is, others, members))
            if same and their_rules == rules:
                return table
        with torch.inference_mode(False), torch.no_grad():
            records = rules.all_records(members[0].v.device)
            rows = [_composed(members, part, rules) for part in records.split(ROWS_AT_ONCE)]
            table = torch.cat(rows).float()  # controls travel as float32
        self._tables = [(members, rules, table), *self._tables[: TABLES_KEPT - 1]]
        return table


def _composed(members: Sequence[SitePack], records: Tensor, rules: Rules) -> Tensor:
    decision = rules.decision(records)
    return torch.cat([m.compose(decision, rules.region) for m in members], -1)


def _is(one: object, other: object) -> bool:
    return one is other
