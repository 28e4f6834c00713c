"""Several experts at one site, side by side along the rank axis: each with parameters of its own.

    y = W x + U (c * (V x))        V: (R, d_in)   U: (d_out, R)   R: the ranks of all experts

A gate is a block of c, so experts are composed exactly (U_1 V_1 + U_2 V_2, never the cross terms of a
sum of factors) and each row of a batch may follow another. Each expert is kept in singular-value form,
so that its ranks are ordered by importance and a rank budget is its best approximation.

Parameters are for training: every expert has its own, with its own optimiser state. What acts is a
`SitePack` made of them, and made anew when one of them changed. While nothing trains, parameters of the
dtype that acts are views of the slab (see `lent`), so that the weights are held once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bem.adapters.lora import Update
from bem.errors import AttachError
from bem.experts.compose import CompositionEngine, Decision, TrustRegion
from bem.experts.lent import LentParameter, lend
from bem.experts.singular import singular_form
from bem.experts.slab import PACKING, Form, Mounting, SitePack, experts_multiplied
from bem.experts.subspace import orthogonality_error, orthonormality_error
from bem.variants.base import Adapter, Code, Flops
from bem.variants.forbidden import Forbidden
from bem.variants.projection import norm_flops
from bem.variants.watch import Watch


class ExpertStack(Adapter):
    """The experts of one frozen linear layer. Their control comes from decisions: see `compose`."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        ranks: Sequence[int],
        form: Form = "auto",
        dtype: torch.dtype = torch.float32,
    ):
        """ranks[e]: ranks of expert e here; 0: it does not touch this site."""
        super().__init__()
        self.d_in, self.d_out, self.ranks = d_in, d_out, tuple(ranks)
        ends = list(accumulate(self.ranks, initial=0))
        self.spans = list(pairwise(ends))  # first and past-the-last rank
        self.control_width = self.rank = ends[-1]
        self.u, self.v = nn.ParameterDict(), nn.ParameterDict()  # expert number -> its factor
        for expert, rank in enumerate(self.ranks):
            if rank:
                v = torch.empty(rank, d_in, dtype=dtype)
                nn.init.kaiming_uniform_(v, a=5**0.5)
                self.v[str(expert)] = nn.Parameter(v)
                # zero: it changes nothing
                self.u[str(expert)] = nn.Parameter(torch.zeros(d_out, rank, dtype=dtype))
        self.mounting = Mounting(form=form)
        self.region: TrustRegion | None = None  # for the price alone
        self.bases: list[Tensor] = []
        """Output directions reserved for each expert; none: all are everybody's."""
        self.register_state_dict_post_hook(_apart)
        self._forget()

    def _forget(self) -> None:
        self._watch, self._packs = Watch(), {}  # dtype -> what acts
        self._engine = CompositionEngine(self.ranks)

    # --- experts ----------------------------------------------------------------------------------

    def factors(self, expert: int) -> tuple[nn.Parameter, nn.Parameter]:
        """(u, v) of one expert: what trains, and what its optimiser state belongs to.

        Raises:
            AttachError: there is no such expert, or it does not touch this site.
        """
        start, stop = self._span(expert)
        if start == stop:
            raise AttachError(f"expert {expert} does not touch this site: it has no ranks here.")
        return self.u[str(expert)], self.v[str(expert)]

    @torch.no_grad()
    def fill(self, expert: int, update: Update) -> None:
        """Copy an update into the block of `expert`, in singular-value form.

        Raises:
            AttachError: no such expert, another shape, more ranks than the block, or it leaves the
                directions reserved for it.
        """
        self._check(expert, update, exact=False)
        start, stop = self._span(expert)
        u, v = singular_form(update, stop - start)
        if self.bases and (lost := self._outside(expert, u)) > 1e-3:
            raise AttachError(
                f"{lost:.1%} of expert {expert} lies outside its reserved directions: train it under the same "
                "reservation, or mount it without one."
            )
        self._write(expert, u, v)
        self.after_step()

    @torch.no_grad()
    def put(self, expert: int, update: Update) -> None:
        """Copy an update bit for bit: one that was taken from a stack, so that nothing changes.

        Raises:
            AttachError: no such expert, or another shape.
        """
        self._check(expert, update, exact=True)
        self._write(expert, update.u, update.v)
        self.keep_out()

    def _check(self, expert: int, update: Update, exact: bool) -> None:
        start, stop = self._span(expert)
        rank, room = len(update.v), stop - start
        fits = update.u.shape == (self.d_out, rank) and update.v.shape == (rank, self.d_in)
        if not fits or rank > room or (exact and rank != room):
            raise AttachError(
                f"expert {expert} has room for u {(self.d_out, room)} and v {(room, self.d_in)} here, got "
                f"{tuple(update.u.shape)} and {tuple(update.v.shape)}."
            )

    def _write(self, expert: int, u: Tensor, v: Tensor) -> None:
        with PACKING:
            if self.ranks[expert]:
                for parameter, value in zip(self.factors(expert), (u, v), strict=True):
                    parameter.copy_(value)

    def canonicalise(self) -> None:
        """Bring every block into singular-value form: after training in place."""
        for expert, rank in enumerate(self.ranks):
            if rank:
                self.fill(expert, self.update_of(expert))

    def update_of(self, expert: int) -> Update:
        """A copy of one expert's update."""
        start, stop = self._span(expert)
        if start == stop:
            return Update(torch.zeros(self.d_out, 0), torch.zeros(0, self.d_in))
        return Update(*map(_own, self.factors(expert)))

    @torch.no_grad()
    def clear(self, expert: int) -> None:
        """Empty a block: the expert was unloaded. Its ranks stay, so that no control changes its width."""
        start, stop = self._span(expert)
        if stop > start:
            self._write(expert, *(torch.zeros_like(p) for p in self.factors(expert)))

    def take(self, other: ExpertStack) -> None:
        """Become another stack of the same shape: its parameters are copied, what acts is shared."""
        with PACKING, torch.no_grad():
            if self.forbidden is not None:
                other.protect(self.forbidden)
            acting = {dtype: other.at(dtype) for dtype in {*self._packs, *other._packs}}
            for own, theirs in zip(self.parameters(), other.parameters(), strict=True):
                own.copy_(theirs)
            self.mounting, self.region = other.mounting, other.region
            self.bases, self._engine = list(other.bases), other._engine
            self._packs = acting
            for pack in acting.values():
                self._stand_in(pack)
            self._watch.changed(*self.parameters())

    def twin(self) -> ExpertStack:
        """A copy with parameters of its own, made without drawing random numbers."""
        twin = ExpertStack.__new__(ExpertStack)
        nn.Module.__init__(twin)
        twin.d_in, twin.d_out, twin.ranks, twin.spans = (
            self.d_in,
            self.d_out,
            self.ranks,
            self.spans,
        )
        twin.control_width = twin.rank = self.rank
        twin.mounting, twin.region = self.mounting, self.region
        twin.u, twin.v = nn.ParameterDict(), nn.ParameterDict()
        for own, copied in ((self.u, twin.u), (self.v, twin.v)):
            for name, parameter in own.items():
                copied[name] = nn.Parameter(_own(parameter), parameter.requires_grad)
        twin.bases, twin.forbidden = list(self.bases), self.forbidden
        twin.register_state_dict_post_hook(_apart)
        twin._forget()
        return twin

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertStack:
        return self.twin()

    # --- reserved directions ----------------------------------------------------------------------

    def reserve(self, bases: Sequence[Float[Tensor, "out dim"]]) -> list[float]:
        """Give each expert output directions of its own, now and after every optimiser step.

        Args:
            bases: one for each expert, see `subspace.reserve`.
        Returns:
            The share of each block's norm that lay outside and is gone (0: none, or an empty block).
        Raises:
            AttachError: bases that do not fit, or are not orthonormal within 1e-5.
        """
        shapes = [tuple(basis.shape) for basis in bases]
        if len(bases) != len(self.ranks) or any(s[0] != self.d_out for s in shapes):
            raise AttachError(
                f"{len(self.ranks)} experts of width {self.d_out} got bases {shapes}."
            )
        error = max([orthogonality_error(bases), *map(orthonormality_error, bases)])
        if not error <= 1e-5:
            raise AttachError(f"the bases are orthonormal only within {error:.1e}: use reserve().")
        self.bases = [basis.detach().clone() for basis in bases]
        self._free_the_bases()
        lost = [self._outside(e, self.update_of(e).u) for e in range(len(self.ranks))]
        self.after_step()
        return lost

    def protect(self, forbidden: Forbidden | None) -> None:
        """See `Adapter.protect`; reserved directions lose what is forbidden of them."""
        self.forbidden = forbidden
        self._free_the_bases()
        self.after_step()

    def _free_the_bases(self) -> None:
        if self.forbidden is not None:
            self.bases = [self.forbidden.inside(basis) for basis in self.bases]

    def writers(self) -> list[Tensor]:
        return list(self.u.values())

    def keep_out(self) -> None:
        with PACKING:
            super().keep_out()

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep every expert inside its reserved directions, and outside of the forbidden ones."""
        for expert, basis in enumerate(self.bases):
            if self.ranks[expert]:
                u, _ = self.factors(expert)
                basis = basis.to(u)
                u.copy_(basis @ (basis.t() @ u))
        self.keep_out()

    def _outside(self, expert: int, u: Tensor) -> float:
        """Share of ||u||_F that leaves the directions reserved for an expert."""
        basis = self.bases[expert].to(u)
        norm = float(u.norm())
        return float((u - basis @ (basis.t() @ u)).norm()) / norm if norm > 0 else 0.0

    def _span(self, expert: int) -> tuple[int, int]:
        if not 0 <= expert < len(self.ranks):
            raise AttachError(f"there is no expert {expert}: this stack holds {len(self.ranks)}.")
        return self.spans[expert]

    # --- what acts --------------------------------------------------------------------------------

    def at(self, dtype: torch.dtype) -> SitePack:
        """What acts in a dtype: the same object until a parameter changes. While a parameter trains it
        is made for each call, differentiable where gradients are on."""
        with torch._C.DisableTorchFunctionSubclass():  # nothing is written to here
            weights = list(self.parameters())
            if any(p.requires_grad for p in weights):
                return self._packed(dtype, lasting=False)
            with PACKING, torch.inference_mode(False), torch.no_grad():
                if self._watch.changed(*weights) or any(p.is_inference() for p in weights):
                    self._packs = {}
                if dtype not in self._packs:
                    self._packs[dtype] = self._packed(dtype, lasting=True)
                    self._stand_in(self._packs[dtype])
                    self._watch.changed(*weights)
                return self._packs[dtype]

    def _stand_in(self, pack: SitePack) -> None:
        """Make parameters of the slab's dtype views of it."""
        if not pack.lasting or any(p.requires_grad or p.is_inference() for p in self.parameters()):
            return
        for expert, rank in enumerate(self.ranks):
            if rank:
                for parameter, block in zip(self.factors(expert), pack.block(expert), strict=True):
                    if (parameter.dtype, parameter.device) == (block.dtype, block.device):
                        lend(parameter, block)

    def _packed(self, dtype: torch.dtype, lasting: bool) -> SitePack:
        us = [u.t().to(dtype) for u in self.u.values()] or [torch.zeros(0, self.d_out, dtype=dtype)]
        vs = [v.to(dtype) for v in self.v.values()] or [torch.zeros(0, self.d_in, dtype=dtype)]
        rows_of_u, v = torch.cat(us), torch.cat(vs)  # always copies: nobody writes to a slab
        if self._engine.device != v.device:
            self._engine = CompositionEngine(self.ranks, v.device)
        return SitePack(self._engine, rows_of_u, v, self.mounting, lasting)

    def mount(
        self, region: TrustRegion | None, weight_norm: float | None, most: int | None
    ) -> None:
        """Say what is known of the site; see `Mounting`."""
        self.region = region
        self.mounting = replace(self.mounting, weight_norm=weight_norm, most=most)
        self._packs = {}

    # --- control and update -----------------------------------------------------------------------

    def control(self, code: Code) -> Tensor:
        raise AttachError(
            "an ExpertStack has no control of its own: a router decides, and compose() turns the decision into it."
        )

    def compose(
        self,
        decision: Decision,
        region: TrustRegion | None,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "*chunks R"]:
        """Control of each chunk, float64, for weights that act in `dtype`; see `CompositionEngine`."""
        return self.at(dtype).compose(decision, region)

    def update(
        self,
        y: Float[Tensor, "*tokens out"],
        x: Float[Tensor, "*tokens in"],
        control: Float[Tensor, "rows R"] | None,
        slot: Int[Tensor, " n"] | None,
    ) -> Float[Tensor, "*tokens out"]:
        """See `Adapter.update`; under the experts as they are now."""
        assert control is not None
        return self.at(x.dtype).update(y, x, control, slot)

    def flops(self, tokens: int = 512, chunk_size: int = 64) -> Flops:
        """As executed in a prefill of so many tokens. Projecting: once for every set of weights, or per
        chunk where not all of the router's actions can be composed beforehand."""
        rows, widths = -(-tokens // chunk_size) + 1, self.d_in + self.d_out
        experts = experts_multiplied(self._engine, self.mounting, widths, rows)
        everyone = experts == len(self.ranks)
        ranks = self.control_width if everyone else experts * self._engine.largest
        return Flops(2 * ranks * widths, self._projecting())

    def _projecting(self) -> int:
        if self.region is None:
            return 0
        most = min(len(self.ranks), self.mounting.most or len(self.ranks))
        n = self.control_width if most == len(self.ranks) else most * self._engine.largest
        return norm_flops(self.region.norm, n)


def _apart(stack: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """A saved state is no view of what acts: safetensors would refuse it, and a write to it would go unseen."""
    for name, parameter in stack.named_parameters(prefix.removesuffix(".")):
        held = state[name]
        if isinstance(parameter, LentParameter) and not isinstance(held, nn.Parameter):
            state[name] = _own(held)


def _own(weight: Tensor) -> Tensor:
    """A copy that shares nothing and lies as a weight does."""
    return weight.detach().clone(memory_format=torch.contiguous_format)


def fixed_updates(
    stacks: dict[str, ExpertStack],
    decision: Decision | Float[Tensor, " experts"],
    region: TrustRegion | None = None,
) -> dict[str, Update]:
    """What the stacks of a model add under one decision, as static updates (see `write_lora`).

    Args:
        stacks: site name -> its experts.
        decision: of one chunk, or the gates alone: all ranks, strength 1.
        region: trust region of the composed update.
    Returns:
        Only ranks whose control is not zero, the control folded into u; sites without any are left out.
    Raises:
        AttachError: several chunks, or gates that are not finite.
    """
    updates = {}
    for site, stack in stacks.items():
        made = _all_ranks(decision, stack) if isinstance(decision, Tensor) else decision
        if made.ranks.numel() != 1:
            raise AttachError(
                f"an export needs one decision, this one speaks of {made.ranks.numel()} chunks."
            )
        if not bool(made.gates.isfinite().all() & made.strength.isfinite().all()):
            raise AttachError("a decision holds NaN or infinite gates: the router diverged.")
        packed = stack.at(torch.float32)
        control = packed.compose(made, region).detach().flatten()
        on = control.nonzero()[:, 0]
        if len(on):
            u = packed.u.detach()[:, on] * control[on]
            updates[site] = Update(u.float(), packed.v.detach()[on])
    return updates


def _all_ranks(gates: Tensor, stack: ExpertStack) -> Decision:
    return Decision(gates, torch.tensor(stack.control_width), torch.tensor(1.0))
