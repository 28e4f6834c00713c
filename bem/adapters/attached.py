"""A frozen model with one adapter on it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bem.adapters import checkpoint
from bem.adapters.budget import Price, price_of
from bem.adapters.build import size_of
from bem.adapters.lora import Lora, missed_by_peft
from bem.adapters.names import clean_name, name_of_base
from bem.adapters.peft_config import BemConfig
from bem.adapters.peft_method import BemModel, adapters_of, modules_of
from bem.adapters.plan import Plan
from bem.adapters.version import DigestCache, SiteSize, Version, base_digest, base_identity
from bem.config import AdapterConfig
from bem.control.controller import ChunkReader
from bem.errors import AttachError
from bem.variants.base import Adapter
from bem.variants.head_gate import HeadGate
from bem.variants.low_rank import LowRank

log = logging.getLogger(__name__)
NAME = "default"  # the adapter's name inside PEFT, unless it comes from PEFT


class Attached:
    """A frozen model with one adapter. `model` is a `peft.PeftModel`."""

    def __init__(
        self,
        peft_model: Any,
        config: AdapterConfig,
        trainable_before: Mapping[str, bool],
        name: str = NAME,
    ):
        """
        Args:
            trainable_before: parameter name -> `requires_grad` before attaching, for `detach`.
            name: the adapter's inside PEFT.
        """
        self.model = peft_model
        self.config = config
        self.name = name
        self._trainable_before = trainable_before
        self._digests = DigestCache()
        self._version: tuple[Any, Version] | None = None

    @property
    def base(self) -> Any:
        """The Hugging Face model inside."""
        return self.model.base_model.model

    @property
    def plan(self) -> Plan:
        """The model's sites, and what went where."""
        return self.base.bem_runtime.plans[self.name]

    # --- what it consists of ----------------------------------------------------------------------

    def modules(self) -> list[Any]:
        """The adapter's modules, bottom to top: updates, modulations, the controller."""
        return [m for _, parts in adapters_of(self.base, self.name) for m in modules_of(parts)]

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, the only ones that train."""
        return [parameter for _, parameter in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of the adapter alone."""
        own = {id(p) for m in self.modules() for p in m.parameters()}
        return [(n, p) for n, p in self.base.named_parameters() if id(p) in own]

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter's tensors (buffers that belong to a checkpoint included), detached."""
        own = {id(t) for m in self.modules() for t in m.state_dict(keep_vars=True).values()}
        whole = self.base.state_dict(keep_vars=True)
        return {n: t.detach() for n, t in whole.items() if id(t) in own}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors as `state_dict` names them.

        Raises:
            AttachError: a tensor is missing, unknown or of another shape.
        """
        own = self.state_dict()
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise AttachError(
                f"the tensors do not fit this adapter: {len(odd)} differ, first {odd[0]!r}."
            )
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise AttachError(
                    f"{name}: {tuple(tensors[name].shape)} does not fit {tuple(tensor.shape)}."
                )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        for module in self.modules():
            if isinstance(module, Adapter):
                module.keep_out()

    # --- what it is -------------------------------------------------------------------------------

    @property
    def version(self) -> Version:
        """What acts here: base, settings, ranks and scales, weights, and what must be last (a clamp).
        Computed anew when one changes."""
        own, last = self.own_version, self.base.bem_runtime.identity_of_last()
        if not last:
            return own
        return Version(own.base, {**own.config, "last": last}, own.sites, own.weights)

    @property
    def own_version(self) -> Version:
        """Of the adapter alone, without what guards it here: what a checkpoint holds."""
        groups = self.weight_groups()
        weights = {group: self._digests(group, named) for group, named in groups.items()}
        state = (base_digest(self.base), self.acting_config(), self.sizes(), weights)
        if self._version is None or self._version[0] != state:
            self._version = (state, Version(*state))
        return self._version[1]

    def acting_config(self) -> dict[str, Any]:
        """The settings on which outputs depend once weights, ranks and scales are given."""
        values: dict[str, Any] = {"variant": self.config.variant}
        values |= {
            k: v for k, v in self.config.model_dump(mode="json").items() if k in self.config.acting
        }
        if "router_layer" in values:
            values["router_layer"] = self.plan.layer  # None stands for a number
        return values

    def weight_groups(self) -> dict[str, dict[str, Tensor]]:
        """Name of a group of weights -> its tensors, under names that no adapter's name is part of."""
        tensors = {self._key(name): t for name, t in self.state_dict().items()}
        return {"adapter": tensors}

    def sizes(self) -> dict[str, SiteSize]:
        """Rank and scale of each adapted site."""
        return {site: size_of(parts) for site, parts in adapters_of(self.base, self.name)}

    def price(self, tokens: int = 512) -> Price:
        """Parameters, and matrix FLOPs per token of a prefill of `tokens` tokens."""
        return price_of(dict(adapters_of(self.base, self.name)), tokens, self.plan.left_alone)

    def sites_report(self) -> str:
        """What is adapted where, and what is left alone and why, as text."""
        lines = [f"{s}: rank {z.rank}, scale {z.scale:g}" for s, z in self.sizes().items()]
        lines += [f"not adapted: {each.where} ({each.why})" for each in self.plan.left_alone]
        return "\n".join(lines)

    def __repr__(self) -> str:
        plan, adapted = self.plan, {site for site, _ in adapters_of(self.base, self.name)}
        layers = sorted({s.layer for s in plan.sites.found if s.name in adapted})
        where = f"layers {layers[0]} to {layers[-1]} of {len(plan.sites.blocks)}"
        alone = "".join(f"; not adapted: {each.where} ({each.why})" for each in plan.left_alone)
        return (
            f"{type(self).__name__}({self.config.variant} on {type(self.base).__name__}, {len(adapted)} sites in "
            f"{where}, {sum(p.numel() for p in self.parameters()):,} parameters{alone})"
        )

    # --- training ---------------------------------------------------------------------------------

    def penalty(self) -> Float[Tensor, ""]:
        """The variant's weighted regularisers for the last forward pass, where no loss holds them yet.

        The loss that the model itself returns in training holds them: then this is 0. Add it to a loss
        that you take from the logits.
        """
        lesson = self.base.bem_lesson
        value = None if lesson.penalty_held else lesson.penalty(self.base)
        lesson.penalty_due = False
        return torch.zeros((), device=self.base.device) if value is None else value

    def after_step(self) -> None:
        """Bring the weights back inside their bounds. Torch's optimisers do it by themselves: for
        updates by other means."""
        for module in self.modules():
            if hasattr(module, "after_step"):
                module.after_step()

    @property
    def n_evidence(self) -> int:
        """Evidence features that the adapter reads; 0: it reads none."""
        readers = (m for m in self.modules() if isinstance(m, ChunkReader))
        return next((m.conditioning.get("evidence", 0) for m in readers), 0)

    @property
    def encoder(self) -> str:
        """`encoder_id` of the vision tower whose numbers the adapter reads; "": it reads none."""
        readers = (m for m in self.modules() if isinstance(m, ChunkReader))
        return next((m.encoder for m in readers), "")

    def gate_magnitude(self) -> Float[Tensor, "batch tokens"] | None:
        """Mean gate over all head-gated sites in the last forward pass.

        None if the variant has no head gates.
        """
        runtime = self.base.bem_runtime
        last = runtime.ambient.last
        if runtime.wiring is None or last is None:
            return None
        gates = [
            m.magnitude(last.control_per_token(i))
            for i, m in enumerate(runtime.wiring.members)
            if isinstance(m, HeadGate)
        ]
        return torch.stack(gates).mean(0).float() if gates else None

    # --- files ------------------------------------------------------------------------------------

    def save(
        self,
        folder: str | Path,
        data_hash: str = "",
        parent: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint that `bem.load` and PEFT read, whole or not at all; s0 as a plain LoRA. Where
        PEFT would put such a LoRA elsewhere, a warning says so.

        Args:
            folder: made if missing; an older checkpoint there is replaced.
            data_hash: sha256 of the training data.
            parent: sha256 of the manifest of the checkpoint that training started from.
            extra: anything JSON that belongs to the record.
        Raises:
            CheckpointError: the folder holds files of somebody else, or cannot be written.
        """
        static = self.config.variant == "s0"
        if static and (missed := missed_by_peft(self.base, self.plan.parts)):
            log.warning("%s: bem.load reads it, PEFT itself does not: %s.", folder, missed)
        return checkpoint.write(
            Path(folder),
            self.config,
            self.own_version,
            base_identity(self.base),
            self._loras() if static else (self._tensors(), self._method()),
            name_of_base(self.base),
            checkpoint.Origin(data_hash, parent, extra or {}),
        )

    def save_lora(self, folder: str | Path) -> Path:
        """`save`, of a static LoRA alone: the folder is a plain PEFT LoRA, for anything that serves those.

        Raises:
            AttachError: the variant is no static LoRA.
        """
        if self.config.variant != "s0":
            raise AttachError(
                f"{self.config.variant} changes from chunk to chunk or is no low-rank update: only s0 is a plain "
                "LoRA. Distil it into one first."
            )
        return self.save(folder)

    def detach(self) -> Any:
        """Take the adapter off and return the model as it was, bit for bit."""
        model = self.model.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = self._trainable_before.get(name, parameter.requires_grad)
        return model

    def _loras(self) -> dict[str, Lora]:
        updates = {site: parts.update for site, parts in adapters_of(self.base, self.name)}
        return {s: Lora(u.v, u.u, u.scale) for s, u in updates.items() if isinstance(u, LowRank)}

    def _tensors(self) -> dict[str, Tensor]:
        """As PEFT names them in a file."""
        groups = self.weight_groups().values()
        return {f"base_model.model.{n}": t for named in groups for n, t in named.items()}

    def _method(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        config = BemConfig(
            **self.config.model_dump(),
            task_type="CAUSAL_LM",
            base_model_name_or_path=name_of_base(self.base),
            inference_mode=True,
            site_sizes=self.sizes(),
            target_modules=sorted(self.sizes()),
        )
        return config.to_dict()

    def _key(self, name: str) -> str:
        return BemModel._remove_adapter_name_from_key(clean_name(name), self.name)
