"""What goes where on one model: the sites that an adapter takes, with their modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bem.adapters.build import Parts, build, left_alone_by, size_of
from bem.adapters.left_alone import LeftAlone
from bem.adapters.names import clean_name
from bem.adapters.quantised import dense_weight
from bem.adapters.sites import FORBIDDEN, Sites, find_sites
from bem.adapters.version import SiteSize
from bem.config import AdapterConfig
from bem.errors import AttachError


@dataclass(frozen=True)
class Plan:
    """One adapter on one model."""

    sites: Sites
    layer: int
    """The router layer."""
    parts: Mapping[str, Parts]
    """Site name -> what it carries."""
    left_alone: tuple[LeftAlone, ...] = ()

    @property
    def sizes(self) -> dict[str, SiteSize]:
        """Rank and scale of each adapted site."""
        return {name: size_of(parts) for name, parts in self.parts.items()}


@dataclass(frozen=True)
class Selection:
    """PEFT's ways to say which of the sites to adapt. None: all of them."""

    target_modules: str | Iterable[str] | None = None
    exclude_modules: str | Iterable[str] | None = None
    layers_to_transform: int | Iterable[int] | None = None

    def __post_init__(self) -> None:
        named = self.target_modules
        refused = (
            []
            if named is None or isinstance(named, str)
            else [n for n in named if FORBIDDEN.search(n)]
        )
        if refused or (isinstance(named, str) and FORBIDDEN.search(named)):
            raise AttachError(
                f"target_modules names {', '.join(sorted(refused)) or named}: a query, key or value projection cannot "
                "be adapted without invalidating the KV cache. Leave target_modules out: BEM finds its sites."
            )
        if named == "all-linear":
            raise AttachError(
                "target_modules='all-linear' includes query, key and value projections, which cannot be adapted "
                "without invalidating the KV cache. Leave target_modules out: BEM finds its sites."
            )

    def of(self, sites: Sites, sizes: Mapping[str, SiteSize]) -> dict[str, SiteSize]:
        """The selected ones of an adapter's sites.

        Raises:
            AttachError: a name or a layer selects no site, or nothing is left.
        """
        chosen = dict(sizes)
        if self.target_modules is not None:
            chosen = {n: s for n, s in chosen.items() if _named(n, self.target_modules)}
            self._each_selects("target_modules", self.target_modules, sizes)
        if self.exclude_modules is not None:
            chosen = {n: s for n, s in chosen.items() if not _named(n, self.exclude_modules)}
            self._each_selects("exclude_modules", self.exclude_modules, sizes)
        if self.layers_to_transform is not None:
            chosen = self._in_layers(sites, chosen)
        if not chosen:
            raise AttachError(f"{self} leaves no site to adapt. The sites are: {_ends(sizes)}.")
        return chosen

    def _each_selects(self, what: str, patterns: Any, sizes: Mapping[str, SiteSize]) -> None:
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            whole = patterns if isinstance(patterns, str) else [pattern]
            if not any(_named(name, whole) for name in sizes):
                raise AttachError(
                    f"{what} names {pattern!r}, where this adapter has no site. Its sites are: {_ends(sizes)}. Other "
                    "layers cannot be adapted; a site below the router layer needs a lower router_layer."
                )

    def _in_layers(self, sites: Sites, sizes: Mapping[str, SiteSize]) -> dict[str, SiteSize]:
        layers = self.layers_to_transform
        wanted = {layers} if isinstance(layers, int) else set(layers or ())
        of_site = {site.name: site.layer for site in sites.found}
        there = {of_site[name] for name in sizes}
        if absent := sorted(wanted - there):
            raise AttachError(
                f"layers_to_transform names layer {absent[0]}, where this adapter has no site: it has some in "
                f"layers {min(there)} to {max(there)}. A layer below the router layer needs a lower router_layer."
            )
        return {name: size for name, size in sizes.items() if of_site[name] in wanted}


def plan_of(
    model: nn.Module,
    config: AdapterConfig,
    selection: Selection | None = None,
    sizes: Mapping[str, SiteSize] | None = None,
) -> Plan:
    """Find the sites of an adapter and make its modules.

    Args:
        selection: which of the config's sites; None: all.
        sizes: exactly these sites with these ranks and scales, as a checkpoint says; None: as config
            and selection say.
    Raises:
        AttachError: there is nothing to adapt, or the model lacks a site.
    """
    sites = find_sites(model, config.sites)
    norms = _weight_norms(model, sites) if getattr(config, "trust_relative", False) else None
    parts = build(sites, config, norms, sizes)
    if selection is not None and sizes is None:
        made = {name: size_of(each) for name, each in parts.items()}
        chosen = selection.of(sites, made)
        parts = parts if chosen == made else build(sites, config, norms, chosen)
    layer = sites.router_layer(config.router_layer)
    return Plan(sites, layer, parts, left_alone_by(model, sites, config, parts))


def _weight_norms(model: nn.Module, sites: Sites) -> dict[str, float]:
    modules: dict[str, Any] = {clean_name(n): m for n, m in model.named_modules()}
    return {s.name: float(dense_weight(modules[s.name], model).norm()) for s in sites.found}


def _named(name: str, patterns: str | Iterable[str]) -> bool:
    """PEFT's rule: a string is a regular expression over the whole name, a list holds ends of names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in patterns)


def _ends(sizes: Iterable[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in sizes}))
