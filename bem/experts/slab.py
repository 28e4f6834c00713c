"""The experts of one site as they act: packed side by side, never written to.

    y = W x + U (c * (V x))        V: (R, d_in)   U: (d_out, R)   R: the ranks of all experts

Whoever holds a slab keeps exactly what he had, whatever becomes of the experts: a changed expert makes
a new slab. Both forms are one product; the gathered one first looks up the blocks in use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bem.experts.compose import CompositionEngine, Decision, TrustRegion
from bem.kernels.reference import masked_low_rank
from bem.variants.base import Update
from bem.variants.low_rank import ready_low_rank
from bem.variants.projection import Grams, Norm, grams

# Weights that need not be read, from which on looking up the blocks in use is faster than multiplying
# all: benchmarks/results/experts.md.
GATHER_ABOVE = 100_000
PACKING = threading.RLock()
"""Held while parameters become slabs, and while several of them change at once."""

Form = Literal["auto", "dense", "gathered"]


@dataclass(frozen=True)
class Mounting:
    """What is known of one site beside its weights."""

    most: int | None = None
    """Experts on at once in any row of a control, at most; None: all of them."""
    form: Form = "auto"
    """dense multiplies all ranks, gathered only the blocks in use; auto: whichever is faster."""
    weight_norm: float | None = None
    """Of the frozen weight, for a relative trust region."""


class SitePack:
    """The experts of one site in one dtype. Immutable; `u` and `v` may carry a graph while they train."""

    def __init__(
        self,
        engine: CompositionEngine,
        rows_of_u: Float[Tensor, "R out"],
        v: Float[Tensor, "R in"],
        mounting: Mounting,
        lasting: bool = True,
    ):
        """rows_of_u: U^T, so that a block of either factor lies in one piece.
        lasting: it stands until a weight changes, so that what follows from it can be kept."""
        self.engine, self.mounting, self.lasting = engine, mounting, lasting
        self.rows_of_u, self.v = rows_of_u, v
        self.u: Float[Tensor, "out R"] = rows_of_u.t()
        self._derived: dict[Any, Any] = {}
        self._multiplied: dict[int, int] = {}  # rows of a control -> experts
        self._in_use: tuple[Tensor, int, tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def control_width(self) -> int:
        """R."""
        return self.engine.width

    @property
    def dtype(self) -> torch.dtype:
        """That computes the update."""
        return self.v.dtype

    @property
    def weight_norm(self) -> float | None:
        """Of the frozen weight."""
        return self.mounting.weight_norm

    @property
    def importance(self) -> Float[Tensor, " R"]:
        """Float64: norm of each rank, its singular value in canonical form."""
        return self._keep("importance", self._sizes)

    def _sizes(self) -> Tensor:
        u, v = self.rows_of_u.detach().double(), self.v.detach().double()
        return u.norm(dim=1) * v.norm(dim=1)

    def grams(self, norm: Norm) -> Grams:
        """Gram matrices of all ranks: R^2 numbers in float64, made on first use."""
        return self._keep(norm, lambda: grams(self.u.detach(), self.v.detach(), norm))

    def at(self, dtype: torch.dtype) -> SitePack:
        """The same experts in another dtype; kept."""
        if dtype == self.dtype:
            return self
        return self._keep(dtype, lambda: self._cast(dtype))

    def _cast(self, dtype: torch.dtype) -> SitePack:
        return SitePack(
            self.engine, self.rows_of_u.to(dtype), self.v.to(dtype), self.mounting, self.lasting
        )

    def _keep(self, name: Any, make: Callable[[], Any]) -> Any:
        if not self.lasting:
            return make()
        if name not in self._derived:
            with torch.inference_mode(False), torch.no_grad():
                self._derived[name] = make()
        return self._derived[name]

    def block(self, expert: int) -> tuple[Tensor, Tensor]:
        """(u, v) of one expert, views."""
        start = sum(self.engine.ranks[:expert])
        stop = start + self.engine.ranks[expert]
        return self.rows_of_u[start:stop].t(), self.v[start:stop]

    # --- control and update -----------------------------------------------------------------------

    def compose(self, decision: Decision, region: TrustRegion | None) -> Float[Tensor, "*chunks R"]:
        """Control of each chunk; see `CompositionEngine`."""
        return self.engine(decision, region, self)

    def update(
        self,
        y: Float[Tensor, "*tokens out"],
        x: Float[Tensor, "*tokens in"],
        control: Float[Tensor, "rows R"],
        slot: Int[Tensor, " n"] | None,
    ) -> Float[Tensor, "*tokens out"]:
        """See `Adapter.update`. A gate of zero has a gradient in the dense form alone."""
        if not self.control_width:
            return y
        here = self if x.dtype == self.v.dtype else self.at(x.dtype)
        experts = here._experts_multiplied(len(control))
        learns = control.requires_grad and self.mounting.form == "auto"
        if experts == len(self.engine.ranks) or learns:
            return masked_low_rank(y, x, here.v, control, slot, here.u)
        v, c, u = here._blocks_in_use(control, experts, keep=slot is None)
        return masked_low_rank(y, x, v, c, slot, u)

    def ready(self, dtype: torch.dtype, rows: int) -> Update:
        """See `Adapter.ready`."""
        here = self.at(dtype)
        if here.control_width and here._experts_multiplied(rows) == len(self.engine.ranks):
            return ready_low_rank(here.v, here.u, dtype)
        return here.update

    def _experts_multiplied(self, rows: int) -> int:
        experts = self._multiplied.get(rows)
        if experts is None:
            widths = self.v.shape[1] + self.rows_of_u.shape[1]
            experts = experts_multiplied(self.engine, self.mounting, widths, rows)
            self._multiplied[rows] = experts
        return experts

    def _blocks_in_use(
        self, control: Tensor, experts: int, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(V, c, U) of so many experts, all those that some row uses among them.

        keep: while a chunk is decoded the same control comes for every token.
        """
        version = -1 if control.is_inference() else control._version
        last = self._in_use
        if last is not None and last[0] is control and last[1] == version:
            return last[2]
        used = F.pad(control.detach().abs().amax(0), (0, 1))
        chosen = used[self.engine.columns].amax(1).topk(experts).indices.sort().values
        columns = self.engine.columns[chosen].flatten()
        real, columns = columns < self.control_width, columns.clamp(max=self.control_width - 1)
        c = control.index_select(1, columns) * real
        blocks = self.v.index_select(0, columns), c, self.rows_of_u.index_select(0, columns).t()
        if keep and not torch.is_grad_enabled():
            self._in_use = (control, version, blocks)
        return blocks


def experts_multiplied(
    engine: CompositionEngine, mounting: Mounting, widths: int, rows: int
) -> int:
    """Of how many experts the ranks are multiplied, by sizes alone: nothing is read back to see which
    are in use.

    Args:
        widths: d_in + d_out.
        rows: of the control table.
    """
    everyone = len(engine.ranks)
    used = min(everyone, rows * (mounting.most or everyone))
    spared = engine.width - used * engine.largest
    if mounting.form == "dense" or (mounting.form == "auto" and spared * widths <= GATHER_ABOVE):
        return everyone
    return used
