"""Experts on a frozen model, and the router that chooses between them.

mounted = bem.mount(model, ["adapters/sql", "adapters/json", "someone/a-peft-lora"])
mounted.model.generate(**ids)                   # the router decides, chunk by chunk
mounted.save("routed/mine")                     # every expert in it is a plain PEFT LoRA
mounted = bem.load_router(model, "routed/mine")
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bem.adapters.attach import attach_parts
from bem.adapters.build import Parts
from bem.adapters.sites import Site, Sites, base_hash, find_sites
from bem.config import EVIDENCE_FEATURES, AdapterConfig, RouterConfig, parse
from bem.errors import AttachError, BaseMismatch, CheckpointError
from bem.experts.compose import TrustRegion
from bem.experts.expert import Expert, Update, from_updates, read_expert
from bem.experts.stack import ExpertStack
from bem.experts.subspace import reserve
from bem.routing.action import ActionSpace
from bem.routing.hysteresis import Limits
from bem.routing.mounted import WEIGHTS, Mounted, check_files
from bem.routing.router import AgenticRouter

MOST = 64  # experts of one model


def mount(
    model: Any,
    experts: Sequence[Expert | str | Path],
    config: RouterConfig | None = None,
    **overrides: Any,
) -> Mounted:
    """Put experts side by side on a frozen model, with a router that is yet to be trained.

    Args:
        model: any Hugging Face causal LM that carries no adapter.
        experts: static LoRAs: checkpoints of ours (s0), PEFT LoRA folders or hub ids, or `Expert`s.
        config: what the router may do; **overrides change fields of it.
    Raises:
        AttachError: no experts, more than 64, two of one name, or something is attached already.
        CheckpointError: an expert that cannot be mounted; says why.
        ConfigError: an unknown or impossible setting.
    """
    values = (config or RouterConfig()).model_dump()
    config = parse(RouterConfig, {**values, **overrides}, "mount")
    if getattr(model, "peft_config", None):
        raise AttachError("the model already carries a PEFT adapter: detach it first.")
    found = [e if isinstance(e, Expert) else read_expert(e, model) for e in experts]
    found.sort(key=lambda e: e.name == config.shared)  # the shared one stands last
    names = [e.name for e in found]
    if config.shared is not None and names[-1] != config.shared:
        raise AttachError(f"no shared expert {config.shared!r}. Experts: {', '.join(names)}.")
    if not 0 < len(found) <= MOST or len(set(names)) < len(names):
        raise AttachError(
            f"1 to {MOST} experts with different names are needed, got {len(found)}: {', '.join(names)}."
        )
    sites = find_sites(model)
    layer = _router_layer(sites, found, config)
    config = config.model_copy(update={"router_layer": layer})
    parts = _parts(model, sites, found, config)
    return _inject(model, parts, config, found)


def load_router(model: Any, folder: str | Path) -> Mounted:
    """Mount what `Mounted.save` wrote.

    Raises:
        CheckpointError: missing, foreign or changed files.
        BaseMismatch: made for another base.
    """
    folder = Path(folder)
    manifest = check_files(folder)
    if manifest["base"] != (found := base_hash(model)):
        raise BaseMismatch(
            f"{folder} was made for a base with hash {manifest['base'][:12]}, this one has {found[:12]}. "
            "Load the base that it was trained on."
        )
    experts = [
        replace(read_expert(folder / "experts" / e["name"], model, e["name"]), about=e["about"])
        for e in manifest["experts"]
    ]
    mounted = mount(model, experts, parse(RouterConfig, manifest["router"], str(folder)))
    try:
        mounted.router.policy.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:  # torch's word for other names or shapes
        mounted.detach()
        raise CheckpointError(
            f"{folder}: {WEIGHTS} does not fit the router that its manifest describes: {error}."
        ) from None
    return mounted


def blank_expert(
    model: Any, name: str, rank: int, layer: int | None = None, about: str = ""
) -> Expert:
    """An expert that is yet to be trained: LoRA's start, at both sites of every layer from `layer` on
    (None: a quarter of the way up). The update is zero."""
    sites = find_sites(model)
    generator = torch.Generator().manual_seed(int(hashlib.md5(name.encode()).hexdigest()[:8], 16))
    updates = {
        site.name: Update(torch.zeros(site.d_out, rank), _born(site, rank, generator))
        for site in sites.above(sites.router_layer(layer))
    }
    return from_updates(name, updates, source="blank", about=about)


def _born(site: Site, rank: int, generator: torch.Generator) -> Tensor:
    bound = site.d_in**-0.5  # kaiming_uniform(a=sqrt(5)), as PEFT's lora_A
    return (torch.rand(rank, site.d_in, generator=generator) * 2 - 1) * bound


def _router_layer(sites: Sites, experts: Sequence[Expert], config: RouterConfig) -> int:
    """The configured layer, else a quarter of the way up or the lowest adapted one."""
    layers = {site.name: site.layer for site in sites.found}
    lowest = min(layers[name] for expert in experts for name in expert.updates)
    if config.router_layer is None:
        return min(sites.router_layer(None), lowest)
    layer = sites.router_layer(config.router_layer)
    if lowest < layer:
        who = next(e.name for e in experts if any(layers[n] == lowest for n in e.updates))
        raise AttachError(
            f"expert {who!r} adapts layer {lowest}, below router_layer {layer}: what is adapted must lie above "
            f"what the router reads. Set router_layer to {lowest} or leave it out."
        )
    return layer


def _parts(
    model: Any, sites: Sites, experts: Sequence[Expert], config: RouterConfig
) -> dict[str, Parts]:
    region = _region(config)
    parts: dict[str, Parts] = {}
    for index, site in enumerate(sites.found):
        ranks = [e.updates[site.name].v.shape[0] if site.name in e.updates else 0 for e in experts]
        if not any(ranks):
            continue
        stack = ExpertStack(site.d_in, site.d_out, ranks)
        stack.region = region
        if region is not None and region.relative:
            stack.weight_norm = region.norm_of(model.get_submodule(site.name).weight)
        for e, expert in enumerate(experts):
            if ranks[e]:
                stack.fill(e, expert.updates[site.name])
        if config.orthogonal:
            _reserve(stack, experts, site, ranks, index)
        parts[site.name] = Parts(stack)
    first = next(iter(parts))
    parts[first] = replace(parts[first], controller=_router(sites, experts, config))
    return parts


def _reserve(
    stack: ExpertStack, experts: Sequence[Expert], site: Site, ranks: list[int], index: int
) -> None:
    """Output directions of its own for each expert; one that was trained outside them is refused."""
    lost = stack.reserve(reserve(site.d_out, ranks, index))
    worst = max(range(len(lost)), key=lost.__getitem__)
    if lost[worst] > 1e-3:
        raise AttachError(
            f"expert {experts[worst].name!r} would lose {lost[worst]:.1%} of its update at {site.name} to the "
            "directions of the others: it was not trained under orthogonal=True. Mount it without."
        )


def _router(sites: Sites, experts: Sequence[Expert], config: RouterConfig) -> AgenticRouter:
    chosen = [e for e in experts if e.name != config.shared]
    if not chosen:
        raise AttachError("a shared expert alone leaves nothing to choose: attach it as s0.")
    largest = _largest(chosen) + _largest([e for e in experts if e not in chosen])
    ranks = config.ranks or tuple(sorted({max(1, largest // 4), max(1, largest // 2), largest}))
    names = tuple(e.name for e in chosen)
    space = ActionSpace(
        names, config.spans, tuple(ranks), config.strengths, len(chosen) < len(experts)
    )
    limits = Limits(**{name: getattr(config, name) for name in Limits.__dataclass_fields__})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return AgenticRouter(
            sites.d_model,
            space,
            limits,
            config.chunk_size,
            config.d_read,
            config.memory,
            config.hidden,
            config.confidence,
            space.option(config.fallback),
            len(EVIDENCE_FEATURES) if config.evidence else 0,
            _region(config),
        )


def _largest(experts: Sequence[Expert]) -> int:
    return max((u.v.shape[0] for e in experts for u in e.updates.values()), default=0)


def _region(config: RouterConfig) -> TrustRegion | None:
    if config.trust_radius is None:
        return None
    return TrustRegion(config.trust_radius, config.trust_norm, config.trust_relative)


def _inject(
    model: Any, parts: dict[str, Parts], config: RouterConfig, experts: Sequence[Expert]
) -> Mounted:
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    adapter = AdapterConfig(
        variant="routed", router_layer=config.router_layer, chunk_size=config.chunk_size
    )
    assert config.router_layer is not None
    peft_model = attach_parts(model, parts, config.router_layer)
    return Mounted(peft_model, adapter, trainable, config, experts)
