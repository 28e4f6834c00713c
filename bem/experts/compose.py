"""From a routing decision to the control of one site that carries several experts.

    c_i = gate_e(i) * keep_i * strength * scale        i: a rank, e(i): the expert that it belongs to

keep: the k most important ranks of the gated experts together, importance |gate| * singular value of
the expert's update (for one expert this is its best rank-k approximation: Eckart & Young, 1936).
scale: into the trust region, see `projection`. Frobenius and spectral norms are exact for what is
composed, not a bound from the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bem.errors import AttachError
from bem.variants.projection import Norm, NormCache, scale_into_ball


@dataclass(frozen=True)
class Decision:
    """What the router decided for each chunk; leading dimensions are those of the chunks."""

    gates: Tensor  # (..., E) weight of each expert, 0: off
    ranks: (
        Tensor  # int (...,): most important ranks kept per site (over the gated experts together)
    )
    strength: Tensor  # (...,) factor on the whole update ("bias scale")

    def __post_init__(self) -> None:
        if not self.gates.shape[:-1] == self.ranks.shape == self.strength.shape:
            raise AttachError(
                f"a decision needs gates (..., experts), ranks (...) and strength (...), got {tuple(self.gates.shape)}, "
                f"{tuple(self.ranks.shape)} and {tuple(self.strength.shape)}."
            )

    @cached_property
    def groups(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """(rows, experts): chunks that gate the same experts are composed together, whoever else is
        in the batch.

        Raises:
            AttachError: a gate or a strength is NaN or infinite.
        """
        gates, strength = self.gates.detach(), self.strength.detach()
        if not bool(gates.isfinite().all() & strength.isfinite().all()):
            raise AttachError("a decision holds NaN or infinite gates: the router diverged.")
        on = (gates != 0).reshape(-1, gates.shape[-1])
        if not on.numel():
            return []
        sets, which = torch.unique(on, dim=0, return_inverse=True)
        experts = [tuple(i for i, x in enumerate(row) if x) for row in sets.tolist()]
        return [((which == i).nonzero()[:, 0], e) for i, e in enumerate(experts) if e]


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

    def norm_of(self, weight: Tensor) -> float:
        """The norm of a frozen weight (2-D), for a relative region."""
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


class CompositionEngine:
    """Composes the experts of one site: gate, rank budget, strength, trust region."""

    def __init__(self, ranks: Sequence[int]):
        """ranks: of each expert at this site; their ranks lie side by side in this order."""
        self.ranks = tuple(ranks)
        owner = [expert for expert, n in enumerate(self.ranks) for _ in range(n)]
        self.owner = torch.tensor(owner, dtype=torch.long)
        self.norms = NormCache()
        self._columns: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def __call__(
        self,
        decision: Decision,
        region: TrustRegion | None,
        u: Tensor,
        v: Tensor,
        importance: Tensor,
        weight_norm: float | None = None,
    ) -> Tensor:
        """The control of each chunk, float32 (..., R).

        Differentiable in gates and strength; the choice of ranks and the scale count as constants.
        """
        if decision.gates.shape[-1] != len(self.ranks):
            raise AttachError(f"{decision.gates.shape[-1]} gates for {len(self.ranks)} experts.")
        shape = (*decision.gates.shape[:-1], len(self.owner))
        radius = None if region is None else region.limit(weight_norm)
        learns = decision.gates.requires_grad or decision.strength.requires_grad
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return self._compose(decision, region, radius, u, v, importance).reshape(shape)

    def _compose(
        self,
        decision: Decision,
        region: TrustRegion | None,
        radius: float | None,
        u: Tensor,
        v: Tensor,
        importance: Tensor,
    ) -> Tensor:
        """(chunks, R), float32."""
        gates = decision.gates.reshape(-1, len(self.ranks)).double()
        strength, ranks = decision.strength.reshape(-1, 1).double(), decision.ranks.reshape(-1, 1)
        control = gates.new_zeros(len(gates), len(self.owner))
        for rows, experts in decision.groups:
            columns = self._columns_of(experts, gates.device)
            if not len(columns):
                continue
            c = gates[rows][:, self.owner.to(gates.device)[columns]]
            c = c * most_important(c.detach().abs() * importance[columns], ranks[rows])
            c = c * strength[rows]
            if region is not None and radius is not None:
                bound = self.norms.bound(u, v, columns, experts, c, region.norm)
                c = c * scale_into_ball(bound, radius)[:, None]
            control = control.index_put((rows[:, None], columns), c)
        return control.float() + 0.0  # no negative zeros: equal controls are equal bits

    def _columns_of(self, experts: tuple[int, ...], device: torch.device) -> Tensor:
        """The ranks of these experts, in order."""
        if (experts, device) not in self._columns:
            mine = torch.isin(self.owner, torch.tensor(experts, dtype=self.owner.dtype))
            self._columns[experts, device] = mine.nonzero()[:, 0].to(device)
        return self._columns[experts, device]


def most_important(score: Tensor, k: Tensor) -> Tensor:
    """True for the k largest scores of each row; of equal ones the first. (rows, n), (rows, 1)."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.zeros_like(order).scatter_(-1, order, place) < k
