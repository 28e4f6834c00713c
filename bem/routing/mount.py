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

from bem.adapters import checkpoint
from bem.adapters.build import Parts
from bem.adapters.quantised import dense_weight
from bem.adapters.rollback import rolled_back
from bem.adapters.sites import Site, Sites, find_linears, find_sites
from bem.adapters.version import BaseIdentity, Version
from bem.config import EVIDENCE_FEATURES, VISION_FEATURES, RouterConfig, parse
from bem.errors import AttachError, CheckpointError
from bem.experts.compose import TrustRegion
from bem.experts.expert import Expert, Update, check_name, from_updates, read_expert
from bem.experts.stack import ExpertStack
from bem.experts.subspace import reserve
from bem.releases.named import router_of
from bem.routing.action import ActionSpace
from bem.routing.composer import Rules
from bem.routing.hysteresis import Limits
from bem.routing.mounted import WEIGHTS, Mounted, check_files
from bem.routing.policy import MacroPolicy, Observed
from bem.routing.router import AgenticRouter

MOST = 64  # experts of one model


def mount(
    model: Any,
    experts: Sequence[Expert | str | Path],
    config: RouterConfig | None = None,
    **overrides: Any,
) -> Mounted:
    """Put experts side by side on a frozen model, with a router that is yet to be trained: until then
    the bare base answers, or the expert that `route=` names.

    Args:
        model: any Hugging Face causal LM that carries no adapter.
        experts: static LoRAs: checkpoints of ours (s0), PEFT LoRA folders or hub ids, or `Expert`s.
        config: what the router may do; **overrides change fields of it.
    Raises:
        AttachError: no experts, more than 64, names that are alike or cannot be folders, or something
            is attached already.
        CheckpointError: an expert that cannot be mounted; says why.
        ConfigError: an unknown or impossible setting.
    """
    values = (config or RouterConfig()).model_dump()
    return _mount(model, experts, parse(RouterConfig, {**values, **overrides}, "mount"), False)


def _mount(
    model: Any, experts: Sequence[Expert | str | Path], config: RouterConfig, as_they_are: bool
) -> Mounted:
    """as_they_are: the experts come from a stack, and go back into one bit for bit."""
    if getattr(model, "peft_config", None):
        raise AttachError("the model already carries a PEFT adapter: detach it first.")
    loaded = [e if isinstance(e, Expert) else read_expert(e, model) for e in experts]
    loaded.sort(key=lambda e: e.name == config.shared)  # the shared one stands last
    _check_names([e.name for e in loaded], config)
    sites = find_linears(model)
    layer = _router_layer(sites, loaded, config)
    config = config.model_copy(update={"router_layer": layer})
    rules = _rules(loaded, config)
    parts = _parts(model, sites, loaded, config, rules, as_they_are)
    first = next(iter(parts))
    parts[first] = replace(parts[first], controller=_router(sites, config, rules))
    mounted = Mounted.inject(model, parts, config, loaded)
    if as_they_are:
        _put_back(mounted, loaded)
    mounted.name_what_acts()
    return mounted


def _put_back(mounted: Mounted, experts: Sequence[Expert]) -> None:
    """PEFT takes what it injects through the base's dtype: the bits that bfloat16 lacks are lost."""
    for site, stack in mounted.stacks.items():
        for number, expert in enumerate(experts):
            if not stack.ranks[number]:
                continue
            saved = expert.updates[site]
            pairs = zip(stack.factors(number), (saved.u, saved.v), strict=True)
            if not all(torch.equal(held.detach().to(value), value) for held, value in pairs):
                stack.put(number, saved)


def _check_names(names: list[str], config: RouterConfig) -> None:
    for name in names:
        check_name(name)
    if config.shared is not None and config.shared not in names:
        raise AttachError(f"no shared expert {config.shared!r}. Experts: {', '.join(names)}.")
    different = {name.casefold() for name in names}  # folders that some file systems hold for one
    if not 0 < len(names) <= MOST or len(different) < len(names):
        raise AttachError(
            f"1 to {MOST} experts with different names are needed, got {len(names)}: {', '.join(names)}."
        )


def load_router(model: Any, folder: str | Path) -> Mounted:
    """Mount what `Mounted.save` wrote.

    Args:
        folder: of that, or the name of a release: `bem-smol`.
    Raises:
        CheckpointError: neither a folder nor a release; missing, foreign or changed files.
        BaseMismatch: made for another base.
    """
    folder = router_of(folder)
    manifest = check_files(folder)
    checkpoint.check_base(_base_of(manifest, folder), model, str(folder))
    for expert in manifest["experts"]:
        check_name(expert["name"])
    experts = [
        replace(read_expert(folder / "experts" / e["name"], model, e["name"]), about=e["about"])
        for e in manifest["experts"]
    ]
    config = parse(RouterConfig, manifest["router"], str(folder))
    with rolled_back(model):
        mounted = _mount(model, experts, config, as_they_are=True)
        mounted.router.trained = manifest["trained"]
        mounted.router.available.copy_(torch.tensor(manifest["available"]))
        try:
            mounted.router.policy.load_state_dict(load_file(folder / WEIGHTS))
        except RuntimeError as error:  # torch's word for other names or shapes
            raise CheckpointError(
                f"{folder}: {WEIGHTS} does not fit the router that its manifest describes: {error}."
            ) from None
        if mounted.own_version != Version.from_dict(manifest["version"]):
            raise CheckpointError(
                f"{folder}: what was loaded is not the version that its manifest names: it does not belong to "
                "these files."
            )
    return mounted


def saved_base(folder: str | Path) -> BaseIdentity:
    """The base that a saved router, or a release's, was made for.

    Raises:
        CheckpointError: neither a folder nor a release; missing, foreign or changed files.
    """
    folder = router_of(folder)
    return _base_of(check_files(folder), folder)


def _base_of(manifest: dict[str, Any], folder: Path) -> BaseIdentity:
    try:
        return BaseIdentity(**manifest["base"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: its manifest is not what was written: {type(error).__name__} {error}."
        ) from None


def blank_expert(
    model: Any, name: str, rank: int, layer: int | None = None, about: str = ""
) -> Expert:
    """An expert that is yet to be trained: LoRA's start, at both sites of every layer from `layer` on
    (None: a quarter of the way up). The update is zero."""
    sites = find_sites(model)
    generator = torch.Generator().manual_seed(int(hashlib.md5(name.encode()).hexdigest()[:8], 16))
    updates = {
        site.name: Update(torch.zeros(site.d_out, rank, device="cpu"), _born(site, rank, generator))
        for site in sites.above(sites.router_layer(layer))
    }
    return from_updates(name, updates, source="blank", about=about)


def _born(site: Site, rank: int, generator: torch.Generator) -> Tensor:
    bound = site.d_in**-0.5  # kaiming_uniform(a=sqrt(5)), as PEFT's lora_A
    return (torch.rand(rank, site.d_in, generator=generator, device="cpu") * 2 - 1) * bound


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
    model: Any,
    sites: Sites,
    experts: Sequence[Expert],
    config: RouterConfig,
    rules: Rules,
    as_they_are: bool,
) -> dict[str, Parts]:
    stacks: dict[str, ExpertStack] = {}
    for index, site in enumerate(sites.found):
        ranks = [e.updates[site.name].v.shape[0] if site.name in e.updates else 0 for e in experts]
        if not any(ranks):
            continue
        stack = stacks[site.name] = ExpertStack(site.d_in, site.d_out, ranks)
        for e, expert in enumerate(experts):
            if ranks[e]:
                (stack.put if as_they_are else stack.fill)(e, expert.updates[site.name])
        if config.orthogonal:
            _reserve(stack, experts, site, ranks, index)
    region, width = rules.region, sum(s.control_width for s in stacks.values())
    weights = sum(p.numel() for s in stacks.values() for p in s.parameters())
    priced = None if rules.tabled(width, weights) else region  # else projected beforehand
    for name, stack in stacks.items():
        relative = region is not None and region.relative
        norm = region.norm_of(dense_weight(model.get_submodule(name), model)) if relative else None
        stack.mount(priced, norm, rules.most)
    return {name: Parts(stack) for name, stack in stacks.items()}


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


def _rules(experts: Sequence[Expert], config: RouterConfig) -> Rules:
    chosen = [e for e in experts if e.name != config.shared]
    if not chosen:
        raise AttachError("a shared expert alone leaves nothing to choose: attach it as s0.")
    largest = _largest(chosen) + _largest([e for e in experts if e not in chosen])
    ranks = config.ranks or (largest,)
    names = tuple(e.name for e in chosen)
    shared = len(chosen) < len(experts)
    space = ActionSpace(names, config.spans, tuple(ranks), config.strengths, shared)
    limits = Limits(**{name: getattr(config, name) for name in Limits.__dataclass_fields__})
    fallback, region = space.option(config.fallback), _region(config)
    return Rules(space, limits, config.chunk_size, config.confidence, fallback, region)


def _router(sites: Sites, config: RouterConfig, rules: Rules) -> AgenticRouter:
    evidence = len(EVIDENCE_FEATURES) if config.evidence else 0
    vision = len(VISION_FEATURES) if config.vision else 0
    observed = Observed(config.memory, evidence, rules.space, vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        policy = MacroPolicy(sites.d_model, observed, config.d_read, config.hidden)
    router = AgenticRouter(policy, rules)
    router.encoder = config.vision or ""
    return router


def _largest(experts: Sequence[Expert]) -> int:
    return max((u.v.shape[0] for e in experts for u in e.updates.values()), default=0)


def _region(config: RouterConfig) -> TrustRegion | None:
    if config.trust_radius is None:
        return None
    return TrustRegion(config.trust_radius, config.trust_norm, config.trust_relative)
