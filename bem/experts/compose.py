"""From a routing decision to the control of one site that carries several experts.

    c_i = gate_e(i) * keep_i * strength * scale        i: a rank, e(i): the expert that it belongs to

keep: the k most important ranks of the gated experts together, importance |gate| * singular value of
the expert's update (for one expert this is its best rank-k approximation: Eckart & Young, 1936).
scale: into the trust region, see `projection`: of what is composed, not a bound from the parts.

A decision says how many experts it gates at most; composing then looks at the ranks of so many experts
for every chunk, whichever they are, in one batch for all chunks. Nothing is read back to the host, so
that a gate that is not finite becomes a control that is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bem.errors import AttachError
from bem.variants.projection import Grams, Norm, ball_scale


@dataclass(frozen=True)
class Decision:
    """What the router decided for each chunk; leading dimensions are those of the chunks."""

    gates: Float[Tensor, "*chunks experts"]
    """Weight of each expert, 0: off."""
    ranks: Int[Tensor, "*chunks"]
    """Most important ranks kept per site, over the gated experts together."""
    strength: Float[Tensor, "*chunks"]
    """Factor on the whole update ("bias scale")."""
    most: int | None = None
    """Experts gated at once in any chunk, at most; None: all of them."""

    def __post_init__(self) -> None:
        if not self.gates.shape[:-1] == self.ranks.shape == self.strength.shape:
            raise AttachError(
                f"a decision needs gates (..., experts), ranks (...) and strength (...), got {tuple(self.gates.shape)}, "
                f"{tuple(self.ranks.shape)} and {tuple(self.strength.shape)}."
            )


@dataclass(frozen=True)
class TrustRegion:
    """How far a composed update may move one weight."""

    radius: float
    norm: Norm = "frobenius"
    relative: bool = False  # in units of the frozen weight's own norm (of the same kind)

    def __post_init__(self) -> None:
        if not self.radius > 0:  # also true for NaN
            raise AttachError(
                f"radius must be > 0, got {self.radius}. To drop an update, gate it off."
            )
        if self.norm not in ("frobenius", "spectral"):
            raise AttachError(f"unknown norm {self.norm!r}: use 'frobenius' or 'spectral'.")

    def norm_of(self, weight: Float[Tensor, "out in"]) -> float:
        """The norm of a frozen weight, for a relative region."""
        order = "fro" if self.norm == "frobenius" else 2
        return float(torch.linalg.matrix_norm(weight.detach().float(), ord=order))

    def limit(self, weight_norm: float | None) -> float:
        """The radius in the units of the weights.

        Raises:
            AttachError: the region is relative and the weight's norm is not known.
        """
        if not self.relative:
            return self.radius
        if weight_norm is None or not 0 < weight_norm < float("inf"):
            raise AttachError(
                f"a relative trust region needs the frozen weight's norm, got {weight_norm}: set "
                "ExpertStack.weight_norm = region.norm_of(weight)."
            )
        return self.radius * weight_norm


class Weights(Protocol):
    """What composing asks of the experts of one site."""

    @property
    def dtype(self) -> torch.dtype:
        """That computes the update."""
        ...

    @property
    def importance(self) -> Tensor:
        """Float64 (R,): norm of each rank."""
        ...

    @property
    def weight_norm(self) -> float | None:
        """Of the frozen weight, for a relative region."""
        ...

    def grams(self, norm: Norm) -> Grams:
        """Of all ranks."""
        ...


class CompositionEngine:
    """Composes the experts of one site: gate, rank budget, strength, trust region."""

    def __init__(self, ranks: Sequence[int], device: torch.device | str = "cpu"):
        """ranks: of each expert at this site; their ranks lie side by side in this order."""
        self.ranks, self.device = tuple(ranks), torch.device(device)
        self.width, self.largest = sum(self.ranks), max(self.ranks, default=0)
        counts = torch.tensor(self.ranks, dtype=torch.long, device=device)
        place = torch.arange(self.largest, device=device)
        columns = (counts.cumsum(0) - counts)[:, None] + place
        self.columns = torch.where(place < counts[:, None], columns, self.width)
        """Int (experts, largest): the ranks of each expert; `width` where it has no more."""
        experts = torch.arange(len(self.ranks), device=device)
        self.owner = experts.repeat_interleave(counts, output_size=self.width)
        """Int (R,): the expert that each rank belongs to."""

    def __call__(
        self, decision: Decision, region: TrustRegion | None, weights: Weights
    ) -> Float[Tensor, "*chunks R"]:
        """The control of each chunk, float64, rounded once to the dtype that computes (of float64 weights
        to float32, in which controls travel).

        Differentiable in gates and strength; the choice of ranks and the scale count as constants.

        Raises:
            AttachError: not as many gates as experts, or a relative region without the weight's norm.
        """
        if decision.gates.shape[-1] != len(self.ranks):
            raise AttachError(f"{decision.gates.shape[-1]} gates for {len(self.ranks)} experts.")
        chunks, radius = decision.gates.shape[:-1], None
        dtype = torch.float32 if weights.dtype == torch.float64 else weights.dtype
        if region is not None:
            radius = region.limit(weights.weight_norm)
        if not self.width:
            return decision.gates.new_zeros((*chunks, 0), dtype=torch.float64)
        gates, columns = self._gated(decision)
        inside = columns.clamp(max=self.width - 1)
        score = gates.detach().abs() * weights.importance[inside]
        score = torch.where(columns < self.width, score, -1.0)  # no rank at all: never kept
        c = gates * most_important(score, decision.ranks.reshape(-1, 1))
        c = c * decision.strength.reshape(-1, 1).double()
        if region is not None and radius is not None:
            grams = weights.grams(region.norm)
            grams = grams.select(inside) if self._subset(decision) else grams
            c = c * ball_scale(grams, c.detach(), radius, dtype)[:, None]
        # one column more takes what is no rank; + 0.0: equal controls are equal bits
        control = c.new_zeros(len(c), self.width + 1).scatter(1, columns, c)[:, : self.width]
        return (control.to(dtype).double() + 0.0).reshape(*chunks, self.width)

    def _subset(self, decision: Decision) -> bool:
        return decision.most is not None and decision.most < len(self.ranks)

    def _gated(self, decision: Decision) -> tuple[Tensor, Tensor]:
        """(gate, rank) of every rank of the experts that may be on, both (chunks, n)."""
        gates = decision.gates.reshape(-1, len(self.ranks)).double()
        if not self._subset(decision):
            columns = torch.arange(self.width, device=gates.device).expand(len(gates), -1)
            return gates[:, self.owner], columns
        experts = gates.detach().abs().topk(decision.most or 0, dim=-1).indices.sort(-1).values
        columns = self.columns[experts]
        own = gates.gather(1, experts)[..., None] * (columns < self.width)
        return own.flatten(1), columns.flatten(1)


def most_important(score: Float[Tensor, "chunks n"], k: Int[Tensor, "chunks 1"]) -> Tensor:
    """True for the k largest scores of each row; of equal ones the first."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.zeros_like(order).scatter_(-1, order, place) < k
