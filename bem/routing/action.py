"""What the router may choose, and the record of what it did.

An action is four options: (expert, span, rank budget, strength). Option 0 of the expert is the bare
base; the others are indices into the lists of `ActionSpace`.

The record is what a later chunk must know of the decisions before it: eight floats at the end of
each chunk's control, so that it lives with the cache and a crop or a reordered beam takes it along.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bem.experts.compose import Decision

HEADS = ("expert", "span", "rank", "strength")
EXPERT, SPAN_LEFT, RANK, STRENGTH, PLAN, FLIPS, FADE, TURN = range(8)
"""Columns of the record: options in force, chunks of the span that are left, actions in this turn's
plan, changes of expert, 16ths taken from the expert's gate for lack of confidence, turns begun."""
RECORD = 8
_COLUMNS = (EXPERT, SPAN_LEFT, RANK, STRENGTH)
FADE_STEPS = 16


@dataclass(frozen=True)
class ActionSpace:
    """The options of each head."""

    experts: tuple[str, ...]
    spans: tuple[int, ...]
    """Chunks."""
    ranks: tuple[int, ...]
    """Ranks kept at each site."""
    strengths: tuple[float, ...]
    shared: bool = False
    """Behind the experts that can be chosen stands one more that always acts."""
    factor: float = 1.0
    """On every strength: what a request asks for."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Options of each head; the expert head has one more than there are experts."""
        return len(self.experts) + 1, len(self.spans), len(self.ranks), len(self.strengths)

    @property
    def plain(self) -> tuple[int, int, int]:
        """Options of span, rank and strength that change nothing: one chunk, all ranks, as trained."""
        nearest = min(range(len(self.strengths)), key=lambda i: abs(self.strengths[i] - 1.0))
        return 0, len(self.ranks) - 1, nearest

    def option(self, expert: str | None) -> int:
        """Option of an expert's name; None is the base.

        Raises:
            ValueError: no expert of that name.
        """
        if expert is None:
            return 0
        if expert not in self.experts:
            raise ValueError(f"no expert {expert!r}. Experts: {', '.join(self.experts)}.")
        return self.experts.index(expert) + 1

    def name(self, option: int) -> str:
        """Name of an expert option, "base" for 0."""
        return self.experts[option - 1] if option else "base"

    def full(self, experts: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch heads"]:
        """Whole actions from expert options alone, everything else plain."""
        rest = experts.new_tensor(self.plain).expand(*experts.shape, 3)
        return torch.cat([experts[..., None], rest], -1)

    def in_force(self, record: Float[Tensor, "batch columns"]) -> Bool[Tensor, "batch options"]:
        """The options that are in force by the records, of all heads side by side.

        The chosen span is not in a record; its first option stands for it.
        """
        columns = tuple(_COLUMNS[h] for h, n in enumerate(self.sizes) for _ in range(n))
        options = tuple(o for n in self.sizes for o in range(n))
        counts = tuple(float(column != SPAN_LEFT) for column in columns)
        values = record.index_select(1, constant(columns, record.device))
        values = values * constant(counts, record.device)
        return values == constant(options, record.device)

    def decision(self, record: Float[Tensor, "*batch columns"], fallback: int) -> Decision:
        """What a record means for the stacks.

        Args:
            fallback: option that takes what a faded gate gives up; 0: nothing does.
        """
        n = len(self.experts) + 1
        gates = one_hot(record[..., EXPERT].long(), n).to(record.dtype)
        fade = record[..., FADE, None] / FADE_STEPS
        rest = torch.zeros_like(gates)
        rest[..., fallback] = 1.0
        gates = (1 - fade) * gates + fade * rest
        always = gates.new_ones(*gates.shape[:-1], int(self.shared))
        return Decision(
            torch.cat([gates[..., 1:], always], -1),
            constant(self.ranks, record.device)[record[..., RANK].long()],
            constant(self.strengths, record.device)[record[..., STRENGTH].long()] * self.factor,
        )


def one_hot(index: Int[Tensor, "*batch"], n: int) -> Bool[Tensor, "*batch n"]:
    """True at `index`."""
    return index[..., None] == torch.arange(n, device=index.device)


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A small tensor that never changes, made once per device."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)
