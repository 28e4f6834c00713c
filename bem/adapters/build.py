"""From a config to modules: which adapter goes to which site of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from bem.adapters.sites import ATTN_OUT, MLP_DOWN, Site, Sites
from bem.config import EVIDENCE_FEATURES
from bem.control.controller import ChunkReader, Controller
from bem.errors import AttachError
from bem.variants.base import Adapter
from bem.variants.film import ResidualFiLMModule
from bem.variants.gate_shaping import GateShapingV2
from bem.variants.head_gate import Gating, HeadGate
from bem.variants.kronecker import KroneckerFactorization
from bem.variants.low_rank import LowRank
from bem.variants.rank_mask import MaskedLowRank, RankMask

if TYPE_CHECKING:
    from bem.config import AdapterConfig

# variant -> the sites that it updates; v4 works on the residual stream, between the sites
UPDATES: dict[str, tuple[str, ...]] = {
    "s0": (ATTN_OUT, MLP_DOWN),
    "pt1": (ATTN_OUT,),
    "v1": (ATTN_OUT, MLP_DOWN),
    "v2": (ATTN_OUT,),
    "v3": (MLP_DOWN,),
    "v4": (),
}
CONTROLLED = ("pt1", "v1", "v2", "v4")


@dataclass(frozen=True)
class Parts:
    """What one site carries: its update, its block's modulation, the temperature of its block's
    heads, the controller. Any may be missing."""

    update: Adapter | None = None
    film: ResidualFiLMModule | None = None
    controller: ChunkReader | None = None
    shaping: GateShapingV2 | None = None


def build(
    sites: Sites, config: AdapterConfig, weight_norms: dict[str, float] | None = None
) -> dict[str, Parts]:
    """All modules of a variant, keyed by the name of the site that carries them.

    Args:
        sites: of the model, from `find_sites`.
        config: the variant and its sizes.
        weight_norms: Frobenius norm of each site's frozen weight; only for a relative trust radius.
    Raises:
        AttachError: the variant has no site in this model.
    """
    if config.variant == "routed":
        raise AttachError("experts are mounted, not built: bem.mount(model, [expert, ...]).")
    layer = sites.router_layer(config.router_layer)
    parts: dict[str, Parts] = {}
    for index, site in enumerate(sites.above(layer)):
        with _seeded(config.seed, index):
            update = _update(site, sites, config, (weight_norms or {}).get(site.name, 1.0))
            film = None
            if config.variant == "v4" and _carries_film(sites, site):
                film = ResidualFiLMModule(sites.d_model, code_width(config), config.film_range)
        shaping = None
        if config.variant == "v2" and config.temperature and site.role == ATTN_OUT:
            shaping = GateShapingV2(len(EVIDENCE_FEATURES), sites.n_heads)
        if update is not None or film is not None:
            parts[site.name] = Parts(update, film, shaping=shaping)
    if not parts:
        raise AttachError(
            f"variant {config.variant!r} found none of its sites ({' '.join(UPDATES[config.variant]) or 'any'}) at or "
            f"above layer {layer}. Lower router_layer, raise the rank of a site, or name sites=..."
        )
    if config.variant in CONTROLLED:
        first = next(iter(parts))
        with _seeded(config.seed, -1):
            controller = Controller(
                sites.d_model,
                code_width(config),
                config.chunk_size,
                heads_read(sites, config),
                {"evidence": n} if (n := evidence_read(config)) else None,
                config.blind,
            )
        parts[first] = replace(parts[first], controller=controller)
    return parts


def code_width(config: AdapterConfig) -> int:
    """Width of the controller's code: of v4 the rank itself, as that is all it has."""
    return config.rank if config.variant == "v4" else config.d_control


def heads_read(sites: Sites, config: AdapterConfig) -> int:
    """Heads whose statistics the controller pools: only head gates read them."""
    return sites.n_heads if config.variant in ("pt1", "v1", "v2") else 0


def evidence_read(config: AdapterConfig) -> int:
    """Evidence features that the variant reads."""
    return len(EVIDENCE_FEATURES) if config.variant == "v2" else 0


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n closest to `wanted`; of two equally close the smaller."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))


def _update(site: Site, sites: Sites, config: AdapterConfig, weight_norm: float) -> Adapter | None:
    rank = config.rank_attn if site.role == ATTN_OUT else config.rank_mlp
    rank = config.rank if rank is None else rank
    if site.role not in UPDATES[config.variant] or rank == 0:
        return None
    radius = config.trust_radius
    if radius is not None and config.trust_relative:
        radius *= weight_norm
    if config.variant == "v3":
        scale = 2.0 if config.alpha is None else config.alpha / rank
        return KroneckerFactorization(site.d_in, site.d_out, rank, scale, config.spectral_cap)
    if config.variant == "s0":
        return LowRank(site.d_in, site.d_out, rank, config.alpha or 2.0 * rank, radius)
    if site.role == ATTN_OUT:
        return _head_gate(site, sites, config, rank, radius)
    return MaskedLowRank(
        site.d_in, site.d_out, rank, config.alpha or 2.0 * rank, _mask(config, rank), radius
    )


def _head_gate(
    site: Site, sites: Sites, config: AdapterConfig, rank: int, radius: float | None
) -> HeadGate:
    groups = nearest_divisor(sites.n_heads, config.head_groups)
    rank = max(groups, round(rank / groups) * groups)  # every group gets the same number of ranks
    mask = _mask(config, rank) if config.variant == "v1" else None
    gating = Gating(
        groups,
        config.d_control,
        sites.n_heads,
        evidence_read(config),
        config.decorrelation,
        config.alignment if config.variant == "v2" else 0.0,
        config.margin_scale,
    )
    alpha = config.alpha or 2.0 * rank
    return HeadGate(site.d_in, site.d_out, rank, alpha, gating, mask, radius)


def _mask(config: AdapterConfig, rank: int) -> RankMask:
    k = min(config.k_active or max(1, rank // 2), rank)
    return RankMask(rank, k, config.d_control, config.mask, config.mask_temperature)


def _carries_film(sites: Sites, site: Site) -> bool:
    """A block's modulation is stored at its MLP down projection, or where it has none, at W_O."""
    return site == (sites.at(site.layer, MLP_DOWN) or sites.at(site.layer, ATTN_OUT))


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
