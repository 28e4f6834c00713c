"""From a config to modules: which adapter goes to which site of a model, and how large it is there.

A new variant is one file in `bem/variants/` and one line in `VARIANTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bem.adapters.left_alone import LeftAlone, left_alone
from bem.adapters.sites import ATTN_OUT, MLP_DOWN, Site, Sites
from bem.adapters.version import SiteSize
from bem.config import EVIDENCE_FEATURES, VISION_FEATURES, AdapterConfig
from bem.config.adapters import (
    FilmConfig,
    GatedConfig,
    GateShapingConfig,
    HeadGateConfig,
    KroneckerConfig,
    RankMaskConfig,
    ScaledConfig,
    StaticConfig,
    TwoSitesConfig,
)
from bem.control.controller import ChunkReader, Controller
from bem.errors import AttachError
from bem.variants.base import Adapter
from bem.variants.film import ResidualFiLMModule
from bem.variants.gate_shaping import GateShapingV2
from bem.variants.head_gate import Gating, HeadGate
from bem.variants.kronecker import KroneckerFactorization
from bem.variants.low_rank import LowRank
from bem.variants.rank_mask import MaskedLowRank, RankMask

N_EVIDENCE = len(EVIDENCE_FEATURES)


@dataclass(frozen=True)
class Parts:
    """What one site carries: its update, its block's modulation, the temperature of its block's
    heads, the controller. Any may be missing."""

    update: Adapter | None = None
    film: ResidualFiLMModule | None = None
    controller: ChunkReader | None = None
    shaping: GateShapingV2 | None = None


@dataclass(frozen=True)
class Place:
    """A site, and how large the update there shall be."""

    site: Site
    sites: Sites
    size: SiteSize
    weight_norm: float
    """Frobenius norm of the frozen weight; 1 unless a trust radius is relative to it."""

    @property
    def alpha(self) -> float:
        """LoRA's alpha: rank times scale."""
        return self.size.rank * self.size.scale

    def radius(self, config: Any) -> float | None:
        """The trust radius here, in the units of the weights."""
        if config.trust_radius is None:
            return None
        return config.trust_radius * (self.weight_norm if config.trust_relative else 1.0)


@dataclass(frozen=True)
class Variant:
    """A kind of adapter: its knobs, where it acts, and what makes its modules."""

    config: type[AdapterConfig]
    acts_at: Callable[[Sites, Site], bool]
    update: Callable[[Place, Any], Adapter] | None = None
    film: Callable[[Place, Any], ResidualFiLMModule] | None = None
    shaping: Callable[[Place, Any], GateShapingV2 | None] | None = None
    controller: Callable[[Sites, Any], ChunkReader] | None = None
    """None: static, the same for every chunk."""
    rank: Callable[[Site, Sites, Any], int] | None = None
    """Rank at a site, 0 leaves it out. None: the config's."""


def at(*roles: str) -> Callable[[Sites, Site], bool]:
    """Acts at the sites with these roles."""
    return lambda sites, site: site.role in roles


def build(
    sites: Sites,
    config: AdapterConfig,
    weight_norms: Mapping[str, float] | None = None,
    sizes: Mapping[str, SiteSize] | None = None,
) -> dict[str, Parts]:
    """All modules of an adapter, keyed by the name of the site that carries them.

    Args:
        sites: of the model, from `find_sites`.
        config: the variant and its knobs.
        weight_norms: Frobenius norm of each site's frozen weight; only for a relative trust radius.
        sizes: exactly these sites with these ranks and scales; None: as the config says.
    Raises:
        AttachError: the variant has no site in this model, or `sizes` names one that is none.
    """
    variant = VARIANTS[config.variant]
    places = _places(variant, sites, config, weight_norms or {}, sizes)
    parts = {}
    for index, place in places:
        with _seeded(config.seed, index):
            parts[place.site.name] = _parts_at(variant, place, config)
    if variant.controller is not None:
        first = next(iter(parts))
        with _seeded(config.seed, -1):
            controller = variant.controller(sites, config)
        parts[first] = replace(parts[first], controller=controller)
    return parts


def size_of(parts: Parts) -> SiteSize:
    """Rank and scale of what a site carries."""
    if parts.update is None:
        return SiteSize(parts.film.head.in_features if parts.film is not None else 0, 1.0)
    return SiteSize(parts.update.rank, parts.update.scale)


def left_alone_by(
    model: nn.Module, sites: Sites, config: AdapterConfig, adapted: Iterable[str]
) -> tuple[LeftAlone, ...]:
    """The layers that an adapter at the sites named `adapted` does not touch, and why."""
    acts_at = VARIANTS[config.variant].acts_at
    roles = [r for r in (ATTN_OUT, MLP_DOWN) if acts_at(sites, Site("", 0, r, 0, 0))]
    return left_alone(model, sites, adapted, roles, sites.router_layer(config.router_layer))


def nearest_divisor(n: int, aim: int) -> int:
    """The divisor of n closest to `aim`; of two equally close the smaller."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - aim), d))


def _places(
    variant: Variant,
    sites: Sites,
    config: AdapterConfig,
    weight_norms: Mapping[str, float],
    sizes: Mapping[str, SiteSize] | None,
) -> list[tuple[int, Place]]:
    """(number among the sites above the router layer, place) of every site to adapt."""
    layer = sites.router_layer(config.router_layer)
    if sizes is not None and variant.controller is None:
        layer = 0  # nothing is read there, and sizes say what is adapted
    places = []
    for index, site in enumerate(sites.above(layer)):
        size = sizes.get(site.name) if sizes is not None else _size_at(variant, site, sites, config)
        if size is not None:
            place = Place(site, sites, size, weight_norms.get(site.name, 1.0))
            places.append((index, place))
    absent = sorted((sizes or {}).keys() - {p.site.name for _, p in places})
    if absent:
        raise AttachError(
            f"{absent[0]} and {len(absent) - 1} other layers are no sites of this model at or above layer {layer}: "
            "the adapter was made for another one."
        )
    if not places:
        raise AttachError(
            f"variant {config.variant!r} has none of its sites at or above layer {layer} (of "
            f"{len(sites.found)} in the model). Lower router_layer, raise the rank of a site, or name sites=..."
        )
    return places


def _size_at(variant: Variant, site: Site, sites: Sites, config: AdapterConfig) -> SiteSize | None:
    if not variant.acts_at(sites, site):
        return None
    rank = (variant.rank or _rank)(site, sites, config)
    if not rank:
        return None
    alpha = config.alpha if isinstance(config, ScaledConfig) else float(rank)
    return SiteSize(rank, 2.0 if alpha is None else alpha / rank)


def _parts_at(variant: Variant, place: Place, config: AdapterConfig) -> Parts:
    update = variant.update(place, config) if variant.update else None
    if update is not None:
        update.rank, update.scale = place.size.rank, place.size.scale
    film = variant.film(place, config) if variant.film else None
    shaping = variant.shaping(place, config) if variant.shaping else None
    return Parts(update, film, shaping=shaping)


def _rank(site: Site, sites: Sites, config: AdapterConfig) -> int:
    """The config's rank, which may differ between the two sites of a block."""
    if not isinstance(config, TwoSitesConfig):
        return config.rank
    own = config.rank_attn if site.role == ATTN_OUT else config.rank_mlp
    return config.rank if own is None else own


def _gated_rank(site: Site, sites: Sites, config: GatedConfig) -> int:
    """At the attention output every head group gets the same number of ranks."""
    rank = _rank(site, sites, config)
    if site.role != ATTN_OUT or not rank:
        return rank
    groups = nearest_divisor(sites.n_heads, config.head_groups)
    return max(groups, round(rank / groups) * groups)


# --- what makes the modules ---------------------------------------------------------------------


def _low_rank(place: Place, config: StaticConfig) -> LowRank:
    site = place.site
    return LowRank(site.d_in, site.d_out, place.size.rank, place.alpha, place.radius(config))


def _kronecker(place: Place, config: KroneckerConfig) -> KroneckerFactorization:
    site, size = place.site, place.size
    return KroneckerFactorization(site.d_in, site.d_out, size.rank, size.scale, config.spectral_cap)


def _head_gate(place: Place, config: GatedConfig) -> HeadGate:
    heads = place.sites.n_heads
    shaped = isinstance(config, GateShapingConfig)
    gating = Gating(
        nearest_divisor(heads, config.head_groups),
        config.d_control,
        heads,
        N_EVIDENCE if shaped else 0,
        config.decorrelation,
        config.alignment if shaped else 0.0,
        config.margin_scale if shaped else 1.0,
    )
    mask = _mask(place, config) if isinstance(config, RankMaskConfig) else None
    site, radius = place.site, place.radius(config)
    return HeadGate(site.d_in, site.d_out, place.size.rank, place.alpha, gating, mask, radius)


def _masked(place: Place, config: RankMaskConfig) -> Adapter:
    if place.site.role == ATTN_OUT:
        return _head_gate(place, config)
    site, mask = place.site, _mask(place, config)
    return MaskedLowRank(
        site.d_in, site.d_out, place.size.rank, place.alpha, mask, place.radius(config)
    )


def _mask(place: Place, config: RankMaskConfig) -> RankMask:
    rank = place.size.rank
    k = min(config.k_active or max(1, rank // 2), rank)
    return RankMask(rank, k, config.d_control, config.mask, config.mask_temperature)


def _temperatures(place: Place, config: GateShapingConfig) -> GateShapingV2 | None:
    return GateShapingV2(N_EVIDENCE, place.sites.n_heads) if config.temperature else None


def _film(place: Place, config: FilmConfig) -> ResidualFiLMModule:
    return ResidualFiLMModule(place.sites.d_model, place.size.rank, config.film_range)


def _carries_film(sites: Sites, site: Site) -> bool:
    """A block's modulation is stored at its MLP down projection, or where it has none, at W_O."""
    return site == (sites.at(site.layer, MLP_DOWN) or sites.at(site.layer, ATTN_OUT))


def _gates_controller(sites: Sites, config: GatedConfig) -> Controller:
    """Reads the heads, because head gates do; and evidence and picture where they shape them."""
    shaped = isinstance(config, GateShapingConfig)
    told = {"evidence": N_EVIDENCE} if shaped else {}
    if shaped and config.vision:
        told["vision"] = len(VISION_FEATURES)
    heads, blind = sites.n_heads, shaped and config.blind
    made = Controller(sites.d_model, config.d_control, config.chunk_size, heads, told, blind)
    made.encoder = (shaped and config.vision) or ""
    return made


def _film_controller(sites: Sites, config: FilmConfig) -> Controller:
    """Its code is as wide as the modulation's rank: that is all that reads it."""
    return Controller(sites.d_model, config.rank, config.chunk_size)


VARIANTS: dict[str, Variant] = {
    "s0": Variant(StaticConfig, at(ATTN_OUT, MLP_DOWN), _low_rank),
    "pt1": Variant(
        HeadGateConfig, at(ATTN_OUT), _head_gate, controller=_gates_controller, rank=_gated_rank
    ),
    "v1": Variant(
        RankMaskConfig,
        at(ATTN_OUT, MLP_DOWN),
        _masked,
        controller=_gates_controller,
        rank=_gated_rank,
    ),
    "v2": Variant(
        GateShapingConfig,
        at(ATTN_OUT),
        _head_gate,
        shaping=_temperatures,
        controller=_gates_controller,
        rank=_gated_rank,
    ),
    "v3": Variant(KroneckerConfig, at(MLP_DOWN), _kronecker),
    "v4": Variant(FilmConfig, _carries_film, film=_film, controller=_film_controller),
}
"""Kind -> its section of the config, where it acts and what makes its modules."""


class _seeded:
    """Initial weights depend on the seed and the site alone, not on what was built before."""

    def __init__(self, seed: int, index: int):
        self._fork = torch.random.fork_rng(devices=[])
        self._seed = seed * 100_003 + index + 1

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *exc: object) -> None:
        self._fork.__exit__(*exc)  # type: ignore[arg-type]
