"""The control of every site for what was decided.

A router chooses among few actions, so that what they mean for a set of weights is composed once, for
all of them, and then looked up: at a chunk boundary nothing is computed but an index.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bem.experts.compose import Decision, TrustRegion
from bem.experts.slab import SitePack
from bem.routing.action import EXPERT, FADE, FADE_STEPS, RANK, RECORD, STRENGTH, ActionSpace
from bem.routing.hysteresis import Limits

SMALL = (
    1 << 20
)  # numbers in a table of all actions that is always made; a larger one if the slabs are
ROWS_AT_ONCE = 32  # actions composed together
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
        common = self.space.factor == 1  # others are one request's: not worth a table
        return common and self.actions * width <= max(SMALL, weights)

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

    def without_strength(self, rows: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Of rows of `all_records`: their number where all strengths are one row."""
        fades = self.fades
        return rows // (self.space.sizes[3] * fades) * fades + rows % fades

    def all_records(self, device: torch.device) -> Float[Tensor, "actions record"]:
        """A record for every decision."""
        experts, _, ranks, strengths = self.space.sizes
        options = [torch.arange(n, device=device) for n in (experts, ranks, strengths, self.fades)]
        records = torch.zeros(self.actions, RECORD, device=device)
        records[:, [EXPERT, RANK, STRENGTH, FADE]] = torch.cartesian_prod(*options).float()
        return records


class Table:
    """The controls of all actions for one set of weights.

        control[action, i] = values[action, codes[action, i]]        i: a rank; code 0: off

    At a site the ranks that are kept of one expert share one number, and few experts are on. Which ranks are
    kept does not depend on the strength. So this holds a byte for each rank, not a float32, and not for every
    strength.
    """

    def __init__(self, members: Sequence[SitePack], rules: Rules):
        """members: the experts of each site."""
        self.rules, self.members = rules, [weakref.ref(m) for m in members]
        self._holds = 1 + len(members) * rules.most  # numbers of an action
        values, codes = [], []
        with torch.inference_mode(False), torch.no_grad():
            for records in rules.all_records(members[0].v.device).split(ROWS_AT_ONCE):
                made = self._packed(members, records)
                values.append(made[0])
                codes.append(made[1])
            of_strengths = (-1, rules.space.sizes[3], rules.fades)
            self.codes = torch.cat(codes).unflatten(0, of_strengths).amax(1).flatten(0, 1)
            self.values = torch.cat(values)

    def _packed(self, members: Sequence[SitePack], records: Tensor) -> tuple[Tensor, Tensor]:
        """(values, codes) of some actions."""
        on = self.rules.decision(records).gates != 0
        number = on.cumsum(-1) * on  # of each expert among those that are on: 1, 2, ...
        rows = _composed(members, records, self.rules).float()  # controls travel as float32
        values = rows.new_zeros(len(rows), self._holds)
        codes = []
        for site, (member, row) in enumerate(zip(members, _by_site(members, rows), strict=True)):
            code = torch.where(on, number + site * self.rules.most, 0)
            if member.control_width:
                blocks = F.pad(row, (0, 1))[:, member.engine.columns]
                values.scatter_(1, code, blocks.amax(-1))  # of equal numbers above 0, and zeros
            codes.append(code.to(self._narrow())[:, member.engine.owner] * (row != 0))
        values[:, 0] = 0.0
        return values, torch.cat(codes, -1)

    def _narrow(self) -> torch.dtype:
        """The smallest integer that holds a code."""
        return next(
            d
            for d in (torch.uint8, torch.int16, torch.int32)
            if self._holds <= torch.iinfo(d).max + 1
        )

    def is_of(self, members: Sequence[SitePack], rules: Rules) -> bool:
        """Was it made for these very weights?"""
        same = len(self.members) == len(members)
        same = same and all(own() is m for own, m in zip(self.members, members, strict=True))
        return same and self.rules == rules

    def alive(self) -> bool:
        """Does anybody hold the weights that it was made for?"""
        return all(own() is not None for own in self.members)

    def __call__(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n width"]:
        """Controls of actions by their rows in `Rules.all_records`."""
        code = self.codes.index_select(0, self.rules.without_strength(rows))
        return self.values.index_select(0, rows).gather(1, code.long())


class Composer:
    """Composes the sites' experts for what was decided."""

    def __init__(self) -> None:
        self._tables: list[Table] = []

    def __reduce__(self) -> Any:
        return Composer, ()  # tables are made again where they are needed

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
        table, row = self._table(members, rules), rules.index(records)
        return table(row.flatten()).double().unflatten(0, row.shape)

    def _table(self, members: Sequence[SitePack], rules: Rules) -> Table:
        for table in self._tables:
            if table.is_of(members, rules):
                return table
        table = Table(members, rules)
        others = [t for t in self._tables if t.alive()]
        self._tables = [table, *others[: TABLES_KEPT - 1]]
        return table


def _composed(members: Sequence[SitePack], records: Tensor, rules: Rules) -> Tensor:
    decision = rules.decision(records)
    return torch.cat([m.compose(decision, rules.region) for m in members], -1)


def _by_site(members: Sequence[SitePack], rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split([m.control_width for m in members], -1)
