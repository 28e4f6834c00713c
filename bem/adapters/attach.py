"""Attach a variant to a frozen model; save it, load it, take it off again.

attached = bem.attach(model, "v1", rank=8)
attached.model(**batch).loss.backward()
attached.save("out")
attached = bem.load(model, "out")
model = attached.detach()          # the model as it was, bit for bit
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from bem.adapters import checkpoint
from bem.adapters.attached import NAME, Attached
from bem.adapters.build import VARIANTS, Parts
from bem.adapters.lora import CONFIG, Lora, read_json, read_lora, read_tensors
from bem.adapters.names import clean_name, unwrapped
from bem.adapters.peft_config import BemConfig, ReadyConfig
from bem.adapters.peft_method import BEM, adapters_of
from bem.adapters.plan import Plan
from bem.adapters.rollback import rolled_back
from bem.adapters.sites import find_linears
from bem.adapters.version import SiteSize
from bem.config import AdapterConfig, parse_adapter
from bem.config.adapters import StaticConfig
from bem.errors import AttachError, CheckpointError
from bem.releases.named import static_of
from bem.variants.low_rank import LowRank

__all__ = ["NAME", "Attached", "attach", "attach_parts", "attach_plan", "from_peft", "load"]

log = logging.getLogger(__name__)


def attach(model: Any, variant: str | AdapterConfig | None = None, **overrides: Any) -> Attached:
    """Attach an adapter to a causal LM and freeze the rest.

    If that fails, the model is as it was before. What the adapter leaves alone is logged.

    Args:
        model: any Hugging Face causal LM, compiled or not.
        variant: `s0 pt1 v1 v2 v3 v4`, or a whole config.
        **overrides: knobs of the variant, such as rank=8; see `bem.config.adapters`.
    Raises:
        AttachError: unknown variant, no site in this model, or something is attached already.
        ConfigError: an unknown or impossible setting, or a knob of another variant.
    """
    if isinstance(variant, str) and variant not in VARIANTS:
        raise AttachError(f"unknown variant {variant!r}: use one of {', '.join(VARIANTS)}.")
    values = (
        variant.model_dump() if isinstance(variant, AdapterConfig) else {"variant": variant or "s0"}
    )
    kinds = {kind: each.config for kind, each in VARIANTS.items()}
    return _attach(model, parse_adapter({**values, **overrides}, "attach", kinds))


def attach_parts(model: Any, parts: Mapping[str, Parts], router_layer: int) -> PeftModel:
    """Put modules that were made elsewhere on a model, such as mounted experts.

    If that fails, the model is as it was before.

    Args:
        parts: site name, as in `find_linears` -> what it carries.
        router_layer: the block whose input the controller reads.
    Raises:
        AttachError: something is attached already.
    """
    plan = Plan(find_linears(model), router_layer, parts)
    return _inject(model, ReadyConfig(plan, task_type="CAUSAL_LM"))


def attach_plan(model: Any, plan: Plan, config: AdapterConfig, name: str = NAME) -> Attached:
    """Attach modules that were made already, as `config` would have made them."""
    model = _bare(model)
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    method = BemConfig(**config.model_dump(), task_type="CAUSAL_LM")
    method.made = plan
    return Attached(_inject(model, method, name), config, trainable, name)


def load(model: Any, folder: str | Path, trainable: bool = False) -> Attached:
    """Attach what a checkpoint holds.

    Args:
        model: the base that it was made for.
        folder: written by `Attached.save`; or by PEFT, Trainer or TRL (`PeftModel.save_pretrained`), ours
            or a plain LoRA, which becomes s0. The latter do not say for which base they were made. Or the
            name of a release: `bem-smol` (its static LoRA).
        trainable: False: frozen, for inference.
    Raises:
        CheckpointError: neither a folder nor a release; missing, foreign or changed files.
        BaseMismatch: made for another base.
    """
    folder = static_of(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG}: not a checkpoint.")
    if (folder / checkpoint.MANIFEST).is_file():
        attached = _load_ours(unwrapped(model), folder)
    else:
        log.warning("%s names no base: whether it was made for this one is not known.", folder)
        attached = _load_from_peft(unwrapped(model), folder)
    if not trainable:
        for parameter in attached.parameters():
            parameter.requires_grad = False
        attached.model.eval()
    return attached


def from_peft(peft_model: Any) -> Attached:
    """The handle of an adapter that was attached or loaded by PEFT: to save, measure or mount it.

    Args:
        peft_model: whose active adapter is one of ours.
    Raises:
        AttachError: no PeftModel, or its active adapter is of another kind.
    """
    peft_model = unwrapped(peft_model)
    if not isinstance(peft_model, PeftModel):
        raise AttachError(
            f"{type(peft_model).__name__} is no PeftModel: hand over what get_peft_model or PeftModel.from_pretrained "
            "gave, or use bem.attach."
        )
    name = peft_model.active_adapters[0]
    config = peft_model.peft_config[name]
    if not isinstance(config, BemConfig):
        raise AttachError(
            f"the active adapter {name!r} is {getattr(config.peft_type, 'value', config.peft_type)}, not BEM. If it is "
            "a LoRA, save it with save_pretrained and load it with bem.load, which reads it as s0."
        )
    return Attached(peft_model, config.adapter_config(), {}, name)


def _attach(
    model: Any, config: AdapterConfig, sizes: Mapping[str, SiteSize] | None = None
) -> Attached:
    """Attach a config; sizes: exactly these sites, ranks and scales."""
    model = _bare(model)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    method = BemConfig(**config.model_dump(), task_type="CAUSAL_LM", site_sizes=sizes)
    attached = Attached(_inject(model, method), config, trainable)
    for each in attached.plan.left_alone:
        level = logging.INFO if each.by_choice else logging.WARNING
        log.log(level, "%s: not adapted: %s (%s)", config.variant, each.where, each.why)
    return attached


def _bare(model: Any) -> Any:
    """The model inside torch.compile; AttachError unless something can be attached to it."""
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise AttachError(
            f"{type(model).__name__} is no model: hand over a Hugging Face causal LM."
        )
    if getattr(model, "peft_config", None):
        raise AttachError(
            "the model already carries a PEFT adapter: detach it first, or use PEFT's add_adapter."
        )
    return model


def _inject(model: Any, method: Any, name: str = NAME) -> PeftModel:
    model = _bare(model)
    with rolled_back(model):
        return get_peft_model(model, method, adapter_name=name)


def _load_ours(model: Any, folder: Path) -> Attached:
    saved = checkpoint.read(folder)
    checkpoint.check_base(saved.base, model, str(folder))
    with rolled_back(model):
        attached = _attach(model, saved.config, saved.version.sites)
        if saved.config.variant == "s0":
            _fill(attached, read_lora(attached.base, folder, saved.config.sites))
        else:
            _load_tensors(attached, read_tensors(folder), folder)
        _check_version(attached, saved, folder)
    return attached


def _load_from_peft(model: Any, folder: Path) -> Attached:
    """What PEFT wrote: a plain LoRA, or our method without a manifest."""
    method = read_json(folder / CONFIG)
    kind = method.get("peft_type")
    if kind == "LORA":
        loras = read_lora(model, folder)
        sizes = {site: SiteSize(len(x.a), x.scale) for site, x in loras.items()}
        config = StaticConfig(rank=max(z.rank for z in sizes.values()), router_layer=0)
        with rolled_back(model):
            attached = _attach(model, config, sizes)
            _fill(attached, loras)
        return attached
    if kind != BEM:
        raise CheckpointError(
            f"{folder} holds a PEFT adapter of type {kind!r}: BEM reads its own and plain LoRAs."
        )
    config: Any = BemConfig.from_pretrained(str(folder))
    if config.site_sizes is None:
        raise CheckpointError(
            f"{folder}: {CONFIG} names no site_sizes: it was written by another release of BEM, whose checkpoints "
            "are not read. Train the adapter again."
        )
    with rolled_back(model):
        attached = _attach(model, config.adapter_config(), config.site_sizes)
        _load_tensors(attached, read_tensors(folder), folder)
    return attached


@torch.no_grad()
def _fill(attached: Attached, loras: Mapping[str, Lora]) -> None:
    """Copy the factors of LoRAs into an s0 of the same sizes."""
    for site, parts in adapters_of(attached.base, attached.name):
        assert isinstance(parts.update, LowRank)
        parts.update.v.copy_(loras[site].a)
        parts.update.u.copy_(loras[site].b)


def _load_tensors(attached: Attached, tensors: dict[str, Tensor], folder: Path) -> None:
    tensors = {clean_name(name): t for name, t in tensors.items()}
    expected = set(attached._tensors())
    if odd := sorted(expected ^ tensors.keys()):
        missing = "misses" if odd[0] in expected else "holds a tensor that fits nothing here"
        raise CheckpointError(f"{folder} {missing}: {odd[0]} ({len(odd)} such tensors).")
    try:
        set_peft_model_state_dict(attached.model, tensors)
    except RuntimeError as error:  # torch's word for other shapes
        raise CheckpointError(
            f"{folder} does not fit the adapter that its config describes: {error}."
        ) from None


def _check_version(attached: Attached, saved: checkpoint.Saved, folder: Path) -> None:
    if (here := attached.own_version) != saved.version:
        raise CheckpointError(
            f"{folder} was saved as version {saved.version.digest[:12]}, what was loaded is {here.digest[:12]}: the "
            "manifest does not belong to these files."
        )
