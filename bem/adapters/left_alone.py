"""Layers that an adapter does not touch, and why: said when it is attached and beside its price."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bem.adapters.names import clean_name
from bem.adapters.sites import ATTN_OUT, MLP_DOWN, Sites, is_linear, reads_another


@dataclass(frozen=True)
class LeftAlone:
    """Layers that are not adapted."""

    where: str
    why: str
    by_choice: bool
    """A setting says so; else the model has nothing to adapt there."""


def left_alone(
    model: nn.Module,
    sites: Sites,
    adapted: Iterable[str],
    roles: Iterable[str],
    router_layer: int,
) -> tuple[LeftAlone, ...]:
    """What an adapter leaves alone: whole layers, and in the others what is no linear layer.

    Args:
        model: whose sites these are.
        adapted: names of the sites that carry something.
        roles: sites of a layer that the adapter would update.
        router_layer: the lowest layer that its config lets it adapt.
    """
    roles, names = tuple(roles), set(adapted)
    layers = {site.layer for site in sites.found if site.name in names}
    modules = {clean_name(n): m for n, m in model.named_modules() if ".bem_" not in n}
    reasons: dict[tuple[str, bool], list[int]] = {}
    for layer, block in enumerate(sites.blocks):
        if layer < router_layer and layer not in layers:
            reasons.setdefault((f"below router_layer {router_layer}", True), []).append(layer)
            continue
        inside = [n for n, m in modules.items() if n.startswith(block + ".") and is_linear(m)]
        if reads_another(block, inside):
            why = "it attends to another sequence alone, and is not run without one"
            reasons.setdefault((why, False), []).append(layer)
            continue
        for role, part in ((ATTN_OUT, "attention"), (MLP_DOWN, "MLP")):
            if role in roles and sites.at(layer, role) is None:
                fused = _fused(modules, block) if role == MLP_DOWN else ""
                why = f"its {part} ends in no linear layer{fused}"
                reasons.setdefault((why, False), []).append(layer)
        if layer not in layers and any(sites.at(layer, role) for role in roles):
            reasons.setdefault(("none of its sites was chosen", True), []).append(layer)
    depth = len(sites.blocks)
    return tuple(
        LeftAlone(_layers(where, depth), why, chosen) for (why, chosen), where in reasons.items()
    )


def _layers(layers: Sequence[int], depth: int) -> str:
    first, last = layers[0], layers[-1]
    dense = last > first and last - first + 1 == len(layers)
    named = f"{first} to {last}" if dense else ", ".join(map(str, layers))
    return f"layer{'s' if len(layers) > 1 else ''} {named} of {depth}"


def _fused(modules: Mapping[str, nn.Module], block: str) -> str:
    """Names the module that holds a block's experts in one tensor, if there is one."""
    for name, module in modules.items():
        if name.startswith(block + ".") and not isinstance(module, nn.Conv1d):
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() == 3:
                    return f": experts are fused into one tensor, {type(module).__name__}.{key}"
    return ""
