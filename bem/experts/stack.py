"""Several experts at one site, side by side along the rank axis.

    y = W x + U (c * (V x))        V: (R, d_in)   U: (d_out, R)   R: the ranks of all experts

A gate is a block of c, so experts are composed exactly (U_1 V_1 + U_2 V_2, never the cross terms of a
sum of factors) and each row of a batch may follow another. Each expert is kept in singular-value form,
so that its ranks are ordered by importance and a rank budget is its best approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bem.adapters.lora import Update
from bem.errors import AttachError
from bem.experts.compose import CompositionEngine, Decision, TrustRegion
from bem.experts.subspace import orthogonality_error
from bem.variants.base import Adapter, Code, Flops
from bem.variants.watch import Watch

# Weights in U and V of all experts, from which on reading them all for each token takes longer than
# looking up the blocks in use. What counts is their number and not their share of the frozen layer:
# benchmarks/results/experts.md.
GATHER_ABOVE = 100_000
FEW_TOKENS = 64  # up to here one product over all blocks in use is faster than one for each


class ExpertStack(Adapter):
    """The experts of one frozen linear layer. Their control comes from decisions: see `compose`."""

    owner: Tensor  # int (R,): the expert that each rank belongs to
    importance: Tensor  # (R,): singular value of each rank

    def __init__(
        self,
        d_in: int,
        d_out: int,
        ranks: Sequence[int],
        form: Literal["auto", "dense", "gathered"] = "auto",
        dtype: torch.dtype = torch.float32,
    ):
        """ranks[e]: ranks of expert e here; 0: it does not touch this site.

        form: dense multiplies all ranks, gathered only the blocks that a token uses; auto: whichever
            is faster at this size.
        """
        super().__init__()
        self.ranks = tuple(ranks)
        ends = list(accumulate(self.ranks, initial=0))
        self.spans = list(pairwise(ends))  # first and past-the-last rank
        total = self.control_width = ends[-1]
        self.v = nn.Parameter(torch.empty(total, d_in, dtype=dtype))
        if total:
            nn.init.kaiming_uniform_(self.v, a=5**0.5)
        self.u = nn.Parameter(torch.zeros(d_out, total, dtype=dtype))  # zero: it changes nothing
        self.engine = CompositionEngine(self.ranks)
        self.register_buffer("owner", self.engine.owner.clone())
        self.register_buffer("importance", torch.zeros(total))
        large = total * (d_in + d_out) > GATHER_ABOVE
        self.gathered = form == "gathered" or (form == "auto" and large)
        self.form = form
        self.region: TrustRegion | None = None  # for the price alone
        self.weight_norm: float | None = None  # of the frozen weight, for a relative region
        self.bases: list[Tensor] = []
        self._watch = Watch()
        self._kept: tuple[Tensor, Tensor, Tensor] = ()  # type: ignore[assignment]

    # --- experts ----------------------------------------------------------------------------------

    @torch.no_grad()
    def fill(self, expert: int, update: Update) -> None:
        """Copy an update into the block of `expert`, in singular-value form.

        Raises:
            AttachError: no such expert, another shape, more ranks than the block, or it leaves the
                directions reserved for it.
        """
        start, stop = self._span(expert)
        (d_out, d_in), rank = (len(self.u), self.v.shape[1]), len(update.v)
        if update.u.shape != (d_out, rank) or update.v.shape != (rank, d_in) or rank > stop - start:
            raise AttachError(
                f"expert {expert} has room for u {(d_out, stop - start)} and v {(stop - start, d_in)} here, got "
                f"{tuple(update.u.shape)} and {tuple(update.v.shape)}."
            )
        u, v, importance = singular_form(update, stop - start)
        if self.bases and (lost := self._outside(expert, u.to(self.u))) > 1e-3:
            raise AttachError(
                f"{lost:.1%} of expert {expert} lies outside its reserved directions: train it under the same "
                "reservation, or mount it without one."
            )
        self.u[:, start:stop].copy_(u)
        self.v[start:stop].copy_(v)
        self.importance[start:stop].copy_(importance)
        self.after_step()

    def canonicalise(self) -> None:
        """Bring every block into singular-value form: after training in place."""
        for expert, rank in enumerate(self.ranks):
            if rank:
                self.fill(expert, self.update_of(expert))

    def update_of(self, expert: int) -> Update:
        """A copy of one expert's update."""
        start, stop = self._span(expert)
        return Update(self.u[:, start:stop].detach().clone(), self.v[start:stop].detach().clone())

    @torch.no_grad()
    def clear(self, expert: int) -> None:
        """Empty a block: the expert was unloaded."""
        start, stop = self._span(expert)
        self.u[:, start:stop].zero_()
        self.v[start:stop].zero_()
        self.importance[start:stop].zero_()

    def reserve(self, bases: Sequence[Tensor]) -> list[float]:
        """Give each expert output directions of its own, now and after every optimiser step.

        Args:
            bases: one (d_out, dim) for each expert, see `subspace.reserve`.
        Returns:
            The share of each block's norm that lay outside and is gone (0: none, or an empty block).
        Raises:
            AttachError: bases that do not fit, or are not orthonormal within 1e-5.
        """
        shapes = [tuple(basis.shape) for basis in bases]
        if len(bases) != len(self.ranks) or any(s[0] != len(self.u) for s in shapes):
            raise AttachError(
                f"{len(self.ranks)} experts of width {len(self.u)} got bases {shapes}."
            )
        error = max([orthogonality_error(bases), *(_off_unit(b) for b in bases)])
        if not error <= 1e-5:
            raise AttachError(f"the bases are orthonormal only within {error:.1e}: use reserve().")
        self.bases = [basis.detach().to(self.u) for basis in bases]
        lost = [self._outside(e, self.update_of(e).u) for e in range(len(self.ranks))]
        self.after_step()
        return lost

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep every expert inside its reserved directions."""
        for (start, stop), basis in zip(self.spans, self.bases, strict=False):
            basis = basis.to(self.u.device)
            self.u[:, start:stop].copy_(basis @ (basis.t() @ self.u[:, start:stop]))

    def _outside(self, expert: int, u: Tensor) -> float:
        """Share of ||u||_F that leaves the directions reserved for an expert."""
        basis = self.bases[expert].to(u.device)
        norm = float(u.norm())
        return float((u - basis @ (basis.t() @ u)).norm()) / norm if norm > 0 else 0.0

    def _span(self, expert: int) -> tuple[int, int]:
        if not 0 <= expert < len(self.ranks):
            raise AttachError(f"there is no expert {expert}: this stack holds {len(self.ranks)}.")
        return self.spans[expert]

    # --- control and update -----------------------------------------------------------------------

    def control(self, code: Code) -> Tensor:
        raise AttachError(
            "an ExpertStack has no control of its own: a router decides, and compose() turns the decision into it."
        )

    def compose(self, decision: Decision, region: TrustRegion | None) -> Tensor:
        """Control of each chunk, float32 (..., R)."""
        return self.engine(decision, region, self.u, self.v, self.importance, self.weight_norm)

    def update(self, y: Tensor, x: Tensor, control: Tensor | None, slot: Tensor | None) -> Tensor:
        assert control is not None
        if not self.control_width:
            return y
        control = control if slot is None else control.index_select(0, slot)
        control = control.expand(x.numel() // x.shape[-1], -1).view(*x.shape[:-1], -1)
        # a gate of zero has a gradient too, in the dense form alone
        if self.form == "gathered" or (self.gathered and not control.requires_grad):
            return self._update_gathered(y, x, control)
        return _add(y, x, self.v, control, self.u)

    def _update_gathered(self, y: Tensor, x: Tensor, control: Tensor) -> Tensor:
        """Only the blocks that some token uses."""
        few = x.numel() <= FEW_TOKENS * x.shape[-1]
        return (self._update_in_one if few else self._update_by_block)(y, x, control)

    def _update_in_one(self, y: Tensor, x: Tensor, control: Tensor) -> Tensor:
        """Few tokens: one product over all blocks that any of them uses, since reading those takes
        longer than multiplying them."""
        if torch.is_grad_enabled():
            return _add(y, x, *self._in_use(control))
        # while a chunk is decoded, the same control comes for every token
        if self._watch.changed(self.u, self.v, control):
            self._kept = self._in_use(control)
        return _add(y, x, *self._kept)

    def _in_use(self, control: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(V, c, U) of the blocks that some token uses; a run of neighbours is not copied."""
        used = self._experts_used(control)
        spans = [self.spans[expert] for expert in used]
        if all(left[1] == right[0] for left, right in pairwise(spans)):
            start, stop = (spans[0][0], spans[-1][1]) if spans else (0, 0)
            return self.v[start:stop], control[..., start:stop], self.u[:, start:stop]
        ranks = torch.cat([torch.arange(*span, device=control.device) for span in spans])
        return self.v[ranks], control[..., ranks], self.u[:, ranks]

    def _update_by_block(self, y: Tensor, x: Tensor, control: Tensor) -> Tensor:
        """Many tokens: block by block, each for the tokens that use it."""
        control = control.reshape(-1, self.control_width)
        x, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]).clone()
        for expert in self._experts_used(control):
            start, stop = self.spans[expert]
            u, v, c = self.u[:, start:stop], self.v[start:stop], control[:, start:stop]
            rows = c.detach().abs().sum(-1).nonzero()[:, 0]
            first, last = int(rows[0]), int(rows[-1]) + 1
            if last - first == len(rows):  # a run of tokens, such as a chunk: nothing is copied
                out[first:last] += _product(x[first:last], v, c[first:last], u)
            else:
                part = _product(x.index_select(0, rows), v, c.index_select(0, rows), u)
                out.index_add_(0, rows, part.to(out.dtype))
        return out.view(y.shape)

    def _experts_used(self, control: Tensor) -> list[int]:
        used = control.detach().reshape(-1, self.control_width).abs().sum(0) != 0
        return self.owner[used].unique().tolist()

    def flops(self) -> Flops:
        """Dense: all ranks; gathered: the largest expert, as for tokens that follow one at a time.
        Projecting: all ranks, the most it can be."""
        ranks = max(self.ranks, default=0) if self.gathered else self.control_width
        chunk = 0
        if self.region is not None:
            power = 2 if self.region.norm == "frobenius" else 3
            chunk = 2 * self.control_width**power
        return Flops(2 * ranks * (self.v.shape[1] + len(self.u)), chunk)


def _product(x: Tensor, v: Tensor, control: Tensor, u: Tensor) -> Tensor:
    return F.linear(F.linear(x, v.to(x.dtype)) * control, u.to(x.dtype))


def _add(y: Tensor, x: Tensor, v: Tensor, control: Tensor, u: Tensor) -> Tensor:
    return y + _product(x, v, control, u)


def singular_form(update: Update, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U S, V^T, S) of u @ v, float64, largest first, padded with zeros to `rank`.

    V^T keeps unit rows where S is zero, so that an untrained rank can still learn. The SVD is that of
    the small core R_u R_v^T of the factors' QR decompositions.
    """
    if (kept := _as_it_is(update, rank)) is not None:
        return kept
    q_u, r_u = torch.linalg.qr(update.u.detach().double())
    q_v, r_v = torch.linalg.qr(update.v.detach().double().t())
    left, values, right = torch.linalg.svd(r_u @ r_v.t(), full_matrices=False)
    u, v = q_u @ (left * values), (q_v @ right.t()).t()
    missing = rank - len(values)
    return F.pad(u, (0, missing)), F.pad(v, (0, 0, 0, missing)), F.pad(values, (0, missing))


def _as_it_is(update: Update, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """An update that is in this form already, up to float32 rounding, keeps its bits: what is saved and
    read again has the digest that it had."""
    if len(update.v) != rank or not rank:
        return None
    u, v = update.u.detach().double(), update.v.detach().double()
    values = u.norm(dim=0)
    off = (v @ v.t() - torch.eye(len(v), dtype=v.dtype, device=v.device)).abs().max()
    inner = u.t() @ u
    across = (inner - torch.diag(inner.diagonal())).abs().max()
    ordered = bool((values[:-1] >= values[1:] * (1 - 1e-6)).all())
    if not ordered or off > 1e-5 or across > 1e-5 * float(values.max()) ** 2:
        return None
    return u, v, values


def fixed_updates(
    stacks: dict[str, ExpertStack],
    decision: Decision | Tensor,
    region: TrustRegion | None = None,
) -> dict[str, Update]:
    """What the stacks of a model add under one decision, as static updates (see `write_lora`).

    Args:
        stacks: site name -> its experts.
        decision: of one chunk, or the gates alone (experts,): all ranks, strength 1.
        region: trust region of the composed update.
    Returns:
        Only ranks whose control is not zero, the control folded into u; sites without any are left out.
    """
    updates = {}
    for site, stack in stacks.items():
        made = _all_ranks(decision, stack) if isinstance(decision, Tensor) else decision
        with torch.no_grad():
            control = stack.compose(made, region).flatten()
            if len(control) != stack.control_width:
                raise AttachError(
                    f"an export needs one decision, this one speaks of {made.ranks.numel()} chunks."
                )
            on = control.nonzero()[:, 0]
            u = stack.u.detach()[:, on].float() * control[on]
        if len(on):
            updates[site] = Update(u, stack.v.detach()[on].float())
    return updates


def _all_ranks(gates: Tensor, stack: ExpertStack) -> Decision:
    return Decision(gates, torch.tensor(stack.control_width), torch.tensor(1.0))


def _off_unit(basis: Tensor) -> float:
    """How far a basis is from orthonormal."""
    if not basis.numel():
        return 0.0
    basis = basis.detach().double()
    return float((basis.t() @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)).abs().max())
