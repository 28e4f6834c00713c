"""A safety basis on a model: no adapter writes into it, and a clamp behind each protected block is last.

    guard = protect(attached, read_basis("basis"), Knob(level=0.3, floor=0.3))
    with guard.knob.raised(0.8):
        attached.model.generate(...)
    guard.check()                                # SafetyError if any writer leaks

Three things hold then, whatever gate, mask, chunk, strength or sum of experts acts (see `Forbidden`, `Clamp`):

    P^T U = 0       for every factor that writes to the residual stream, after loading and after every step
    FiLM            h + (I - P P^T)((gamma - 1) h + beta)
    z >= floor      behind each protected block, for kappa > 0, whatever was written before

A writer is the attention output or the MLP down projection. Queries, keys, values and what base layers make
of changed inputs are not covered by the first two; the clamp stands behind them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bem.adapters.attached import Attached
from bem.adapters.hooks import add_last_stage
from bem.adapters.peft_method import adapters_of, rewire
from bem.adapters.sites import ATTN_OUT, MLP_DOWN, find_sites
from bem.adapters.version import base_digest
from bem.errors import BaseMismatch, SafetyError
from bem.routing.modes import mode
from bem.routing.mounted import Mounted
from bem.safety.basis import ProtectedLayer, SafetyBasis
from bem.safety.directions import coordinates
from bem.safety.knob import Knob
from bem.variants.forbidden import Forbidden

WRITERS = (ATTN_OUT, MLP_DOWN)
TOLERANCE = 1e-5
"""Largest ||P^T U|| / ||U|| of a writer."""


class Clamp:
    """Behind a protected block, after everything else: no coordinate lies below its floor.

        z' = max(z, r (low + kappa (high - low)))      in units of r, see `coordinates`; kappa = 0: z' = z

    z' grows with kappa, in every coordinate; what lies outside of the basis stays. The floor grows with r, so
    that inflating the rest of the state gains nothing.
    """

    def __init__(self, layer: ProtectedLayer, knob: Knob, digest: str):
        self.layer, self.knob, self.digest = layer, knob, digest
        self._moved: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def identity(self) -> list[Any]:
        """On what outputs depend; requests that raise kappa are named elsewhere."""
        return ["safety", self.digest, self.knob.level]

    def __call__(self, block: int, hidden: Tensor) -> Tensor:
        kappa = self.knob.now()
        if not isinstance(kappa, Tensor) and kappa == 0:
            return hidden
        directions, low, high = self._on(hidden.device)
        c, r = coordinates(hidden.float(), directions)
        if isinstance(kappa, Tensor):
            if kappa.numel() != len(hidden):
                raise SafetyError(f"{kappa.numel()} kappas for a batch of {len(hidden)} rows.")
            kappa = kappa.to(hidden.device, torch.float32).view(-1, *[1] * (hidden.dim() - 1))
        lift = (low + kappa * (high - low) - c).clamp(min=0) * r
        lifted = hidden + (lift @ directions.mT).to(hidden.dtype)
        return torch.where(kappa > 0, lifted, hidden) if isinstance(kappa, Tensor) else lifted

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._moved:
            with torch.inference_mode(False):
                parts = self.layer.directions, self.layer.low, self.layer.high
                directions, low, high = (t.to(device, torch.float32) for t in parts)
                self._moved[device] = directions, low, high
        return self._moved[device]


@dataclass(frozen=True, eq=False)
class Guard:
    """A basis at work on one model."""

    attached: Attached
    basis: SafetyBasis
    knob: Knob

    def leaks(self) -> dict[str, float]:
        """Site -> ||P^T U|| / ||U|| of its worst writer now."""
        found = {}
        for site, forbidden, update in _writers(self.attached, self.basis):
            found[site] = max((forbidden.leak(u) for u in update.writers()), default=0.0)
        return found

    def check(self) -> dict[str, float]:
        """`leaks`, if all is well.

        Raises:
            SafetyError: a writer leaks, or its protection or a clamp was taken away.
        """
        runtime = self.attached.base.bem_runtime
        if others := sorted(set(runtime.plans) - {self.attached.name}):
            raise SafetyError(f"adapter {others[0]!r} on the same model is not guarded: delete it.")
        for site, forbidden, update in _writers(self.attached, self.basis):
            held = update.forbidden
            if held is None or held.basis.shape != forbidden.basis.shape:
                raise SafetyError(f"{site} is not protected any more: call protect() again.")
        stages = runtime.last
        for layer in self.basis.layers:
            if not stages.get(layer.block) or not isinstance(stages[layer.block][-1], Clamp):
                raise SafetyError(
                    f"the clamp behind block {layer.block} is not the last stage there."
                )
        leaks = self.leaks()
        worst = max(leaks, key=leaks.__getitem__, default=None)
        if worst is not None and not leaks[worst] <= TOLERANCE:
            raise SafetyError(
                f"{worst} writes {leaks[worst]:.1e} of its output into the safety basis, at most {TOLERANCE:g} is "
                "allowed: its weights were written to past the guard. Call attached.after_step(), or roll back."
            )
        return leaks

    def release(self) -> None:
        """Take the guard off; projected weights stay as they are."""
        runtime = self.attached.base.bem_runtime
        for block, stages in list(runtime.last.items()):
            kept = [s for s in stages if getattr(s, "knob", None) is not self.knob]
            runtime.last[block] = kept
            if not kept:
                del runtime.last[block]
        for _, parts in adapters_of(self.attached.base, self.attached.name):
            for module in (parts.update, parts.film):
                if module is not None:
                    module.protect(None)
        rewire(self.attached.base)


def protect(attached: Attached, basis: SafetyBasis, knob: Knob | None = None) -> Guard:
    """Guard an adapted model: attached, loaded or mounted. Weights that write into the basis are projected.

    A shadow for training keeps the writers' protection, but has no clamp of its own: protect it too.

    Args:
        knob: None: kappa 0, floor 0: writers are protected, nothing is clamped.
    Raises:
        BaseMismatch: the basis was fitted for another base.
        SafetyError: it is guarded already, or its blocks do not add to the residual stream as they are.
    """
    knob = Knob() if knob is None else knob
    base = attached.base
    _check_base(base, basis)
    if clamps_of(base):
        raise SafetyError("the model is guarded already: release() the other guard first.")
    check_plain_residual(base, attached.plan.sites)
    layers = {site.name: site.layer for site in attached.plan.sites.found}
    for _, forbidden, update in _writers(attached, basis):
        update.protect(forbidden)
    if isinstance(attached, Mounted):  # importance of ranks, and digests, are of what acts now
        for _, _, stack in _writers(attached, basis):
            stack.canonicalise()
        attached.name_what_acts()
    for site, parts in adapters_of(base, attached.name):
        if parts.film is not None:
            parts.film.protect(basis.forbidden(layers[site]))
    for layer in basis.layers:
        add_last_stage(base, layer.block, Clamp(layer, knob, basis.digest), rewire)
    guard = Guard(attached, basis, knob)
    guard.check()
    return guard


def clamp_bare(base: Any, basis: SafetyBasis, knob: Knob) -> None:
    """The clamps alone, on a model that nothing is attached to, for good: a server's bare base.

    Raises:
        BaseMismatch: the basis was fitted for another base.
        SafetyError: it carries an adapter, or its blocks do not add to the residual stream as they are.
    """
    if hasattr(base, "bem_runtime"):
        raise SafetyError("the model carries an adapter: protect() what bem.attach returned.")
    _check_base(base, basis)
    sites = find_sites(base)
    check_plain_residual(base, sites)
    modules = dict(base.named_modules())
    clamps = [Clamp(layer, knob, basis.digest) for layer in basis.layers]
    for clamp in clamps:
        block = modules[sites.blocks[clamp.layer.block]]
        block.register_forward_hook(partial(clamped, clamp))
    base.__dict__["bem_clamps"] = clamps


def clamped(clamp: Clamp, module: nn.Module, args: tuple, output: Any) -> Any:
    """A forward hook of a bare block: its output under a clamp."""
    several = isinstance(output, tuple | list)
    hidden = clamp(clamp.layer.block, output[0] if several else output)
    return type(output)((hidden, *output[1:])) if several else hidden


def clamps_of(base: Any) -> list[Clamp]:
    """On a model, adapted or bare, bottom to top."""
    runtime = vars(base).get("bem_runtime")
    stages = [] if runtime is None else [s for b in sorted(runtime.last) for s in runtime.last[b]]
    return [s for s in stages if isinstance(s, Clamp)] or vars(base).get("bem_clamps", [])


def knob_of(base: Any) -> Knob | None:
    """The knob of the guard on a model, adapted or bare; None: there is no guard."""
    return next((clamp.knob for clamp in clamps_of(base)), None)


def _check_base(base: Any, basis: SafetyBasis) -> None:
    if (here := base_digest(base)) != basis.base:
        raise BaseMismatch(
            f"the basis was fitted for base {basis.base[:12]}, this one is {here[:12]}: fit one for it."
        )


def _writers(attached: Attached, basis: SafetyBasis) -> list[tuple[str, Forbidden, Any]]:
    """(site, what it must leave alone, its update) of every adapted writer below a protected layer."""
    where = {site.name: (site.layer, site.role) for site in attached.plan.sites.found}
    found = []
    for site, parts in adapters_of(attached.base, attached.name):
        layer, role = where[site]
        forbidden = basis.forbidden(layer) if role in WRITERS else None
        if parts.update is not None and forbidden is not None:
            found.append((site, forbidden, parts.update))
    return found


@torch.no_grad()
def check_plain_residual(base: Any, sites: Any) -> None:
    """Do blocks add the outputs of their writers to the residual stream as they are, up to one factor? Where a
    norm stands behind a writer, U with P^T U = 0 would still reach the basis.

    Raises:
        SafetyError: they do not.
    """
    modules = dict(base.named_modules())
    seen: dict[str, Tensor] = {}
    handles = []
    block = sites.blocks[len(sites.blocks) // 2]
    writers = [s.name for s in sites.found if s.name.startswith(block + ".") and s.role in WRITERS]
    for name in (block, *writers):  # first: before FiLM and clamps
        hook = partial(_keep, seen, name, name == block)
        handles.append(modules[name].register_forward_hook(hook, prepend=True, with_kwargs=True))
    try:
        with mode(base, training=False):
            base(input_ids=torch.arange(2, 10, device=base.device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    change, added = seen[block].flatten(), sum(seen[name] for name in writers)
    if isinstance(added, Tensor) and added.numel() == change.numel() and added.norm() > 0:
        added = added.flatten()
        factor = (added @ change) / (added @ added)
        if (change - factor * added).norm() <= 1e-2 * change.norm():
            return
    raise SafetyError(
        f"{block} does not add its attention and MLP outputs to the residual stream as they are (a norm behind "
        "them, several streams, or a mixture of experts): what an adapter writes there cannot be kept out of a basis."
    )


def _keep(
    seen: dict[str, Tensor],
    name: str,
    is_block: bool,
    module: nn.Module,
    args: tuple,
    kwargs: dict,
    output: Any,
) -> None:
    out = (output[0] if isinstance(output, tuple | list) else output).double()
    if is_block:  # what it added
        out = out - (args[0] if args else kwargs["hidden_states"]).double()
    seen[name] = out
