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

    def __init__(self, ranks: Sequence[int]):
        """ranks: of each expert at this site; their ranks lie side by side in this order."""
        self.ranks = tuple(ranks)
        self.width, self.largest = sum(self.ranks), max(self.ranks, default=0)
        owner = [expert for expert, n in enumerate(self.ranks) for _ in range(n)]
        self.owner = torch.tensor(owner, dtype=torch.long)
        ends = torch.tensor(self.ranks, dtype=torch.long).cumsum(0)
        place = torch.arange(self.largest)
        starts, own = ends - torch.tensor(self.ranks, dtype=torch.long), place < ends[:, None]
        own = place < torch.tensor(self.ranks, dtype=torch.long)[:, None]
        self.columns = torch.where(own, starts[:, None] + place, self.width)
        """Int (experts, most ranks): the ranks of each expert; `width` where it has no more."""

    def to(self, device: torch.device) -> CompositionEngine:
        """The same with its tables on a device."""
        if self.owner.device != device:
            self.owner, self.columns = self.owner.to(device), self.columns.to(device)
        return self

    def __call__(
        self, decision: Decision, region: TrustRegion | None, weights: Weights
    ) -> Float[Tensor, "*chunks R"]:
        """The control of each chunk in the dtype that computes, to which it is rounded once.

        Differentiable in gates and strength; the choice of ranks and the scale count as constants.

        Raises:
            AttachError: as many gates as there are experts are needed.
        """
        if decision.gates.shape[-1] != len(self.ranks):
            raise AttachError(f"{decision.gates.shape[-1]} gates for {len(self.ranks)} experts.")
        radius = None if region is None else region.limit(weights.weight_norm)
        gates = decision.gates.reshape(-1, len(self.ranks)).double()
        gate, columns = self._gated(gates, decision.most)
        inside = columns.clamp(max=max(0, self.width - 1))
        if not self.width:
            return gates.new_zeros((*decision.gates.shape[:-1], 0), dtype=weights.dtype)
        score = gate.detach().abs() * weights.importance[inside]
        score = torch.where(columns < self.width, score, -1.0)
        c = gate * most_important(score, decision.ranks.reshape(-1, 1))
        c = c * decision.strength.reshape(-1, 1).double()
        if region is not None and radius is not None:
            chosen = weights.grams(region.norm)
            if self._padded(decision.most):
                chosen = chosen.select(inside)
            c = c * ball_scale(chosen, c.detach(), radius, weights.dtype)[..., None]
        spare = c.new_zeros(len(c), self.width + 1)  # the last one takes what no rank owns
        control = spare.scatter(1, columns, c)[:, : self.width]
        # no negative zeros: equal controls are equal bits
        return (control.to(weights.dtype) + 0.0).unflatten(0, decision.gates.shape[:-1])

    def _padded(self, most: int | None) -> bool:
        return most is not None and most < len(self.ranks)

    def _gated(self, gates: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
        """(gate of each rank, the rank it is) of the experts that may be on, both (chunks, n)."""
        tables = self.to(gates.device)
        if not self._padded(most):
            columns = torch.arange(self.width, device=gates.device).expand(len(gates), -1)
            return gates[:, tables.owner], columns
        experts = gates.detach().abs().topk(most or 0, dim=-1).indices.sort(-1).values
        columns = tables.columns[experts]
        gate = gates.gather(1, experts)[..., None].expand(columns.shape)
        return gate.flatten(1) * (columns < self.width).flatten(1), columns.flatten(1)


def most_important(score: Float[Tensor, "chunks n"], k: Int[Tensor, "chunks 1"]) -> Tensor:
    """True for the k largest scores of each row; of equal ones the first."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.zeros_like(order).scatter_(-1, order, place) < k
