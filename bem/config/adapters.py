"""What is attached to the frozen base, and how it is trained.

One section for each kind of adapter. A knob of another kind is an error that says whose it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from bem.config.section import Section, Seed, parse
from bem.errors import ConfigError

EVIDENCE_FEATURES = (
    "present",
    "best",
    "margin",
    "entropy",
    "contradiction",
    "coverage",
    "consistency",
    "count",
)
"""What an adapter is told about retrieved evidence, each in [0, 1]; all zero: no evidence."""


LARGEST_RANK = 1 << 16


class AdapterConfig(Section):
    """What every kind of adapter is told.

    `AdapterConfig(variant="v1", rank=8)` makes the section of that kind.
    """

    def __new__(cls, *args: Any, **knobs: Any) -> AdapterConfig:
        kind = KINDS.get(knobs.get("variant", "s0"), cls) if cls is AdapterConfig else cls
        return super().__new__(kind)

    acting: ClassVar[tuple[str, ...]] = ()
    """Knobs on which outputs depend once weights, ranks and scales are given: part of a `Version`."""

    variant: str
    """Kind of adapter, a key of `KINDS`."""
    rank: int = Field(default=8, ge=1, le=LARGEST_RANK)
    """Rank of the update at each site (v3: number of Kronecker terms; v4: width of the modulation)."""
    chunk_size: int = Field(default=64, ge=1)
    """Tokens for which one control holds; chunks also restart at every turn. A static adapter has one
    control for all of them."""
    router_layer: int | None = Field(default=None, ge=0)
    """Layer whose input the controller reads; sites of this layer and above are adapted.
    None: a quarter of the way up. 0: the embeddings."""
    sites: dict[str, str | list[str]] | None = None
    """Override of the site search: {'attn_out': pattern, 'mlp_down': pattern}, glob or regex."""
    seed: Seed = 0
    """Seed of the initial weights."""


class ScaledConfig(AdapterConfig):
    """An update times a constant. Abstract."""

    alpha: float | None = Field(default=None, gt=0)
    """Update scale is alpha / rank. None: 2 * rank, so a scale of 2."""


class LowRankConfig(ScaledConfig):
    """An update in rank space, U diag(c) V. Abstract."""

    trust_radius: float | None = Field(default=None, gt=0)
    """Largest Frobenius norm of a site's update in any chunk. None: not projected."""
    trust_relative: bool = False
    """Radius in units of the frozen weight's Frobenius norm instead of absolute."""


class TwoSitesConfig(LowRankConfig):
    """Low-rank updates at both sites of a block. Abstract."""

    rank_attn: int | None = Field(default=None, ge=0, le=LARGEST_RANK)
    """Rank at the attention output alone; None: `rank`. 0 leaves the site out."""
    rank_mlp: int | None = Field(default=None, ge=0, le=LARGEST_RANK)
    """Rank at the MLP down projection alone; None: `rank`. 0 leaves the site out."""


class StaticConfig(TwoSitesConfig):
    """s0: static LoRA."""

    variant: Literal["s0"] = "s0"


class GatedConfig(LowRankConfig):
    """Gates of head groups at the attention output. Abstract."""

    acting: ClassVar[tuple[str, ...]] = (
        "chunk_size",
        "router_layer",
        "trust_radius",
        "trust_relative",
    )

    head_groups: int = Field(default=4, ge=1)
    """Head groups with a gate each; the nearest divisor of n_heads is taken."""
    d_control: int = Field(default=32, ge=1)
    """Width of the controller's code z."""
    decorrelation: float = Field(default=0.0, ge=0)
    """Weight of the penalty on the correlation between head-group gates, over the chunks of a micro-batch."""


class HeadGateConfig(GatedConfig):
    """pt1: head-group gates."""

    variant: Literal["pt1"] = "pt1"


class RankMaskConfig(GatedConfig, TwoSitesConfig):
    """v1: pt1 with a dynamic rank mask, and a masked update at the MLP."""

    acting: ClassVar[tuple[str, ...]] = (*GatedConfig.acting, "k_active", "mask")

    variant: Literal["v1"] = "v1"
    k_active: int | None = Field(default=None, ge=1)
    """Active ranks per chunk. None: rank // 2."""
    mask: Literal["learned", "random", "fixed"] = "learned"
    """Who chooses the ranks; random and fixed are controls."""
    mask_temperature: float = Field(default=1.0, gt=0)
    """Temperature of the Gumbel top-k relaxation while it trains."""

    @model_validator(mode="after")
    def _some_ranks_rest(self) -> RankMaskConfig:
        largest = max(self.rank, self.rank_attn or 0, self.rank_mlp or 0)
        if self.k_active is not None and self.k_active > largest:
            raise ValueError(f"k_active {self.k_active} exceeds the rank {largest}")
        return self


class GateShapingConfig(GatedConfig):
    """v2: pt1 with gates and attention temperatures shaped by evidence."""

    acting: ClassVar[tuple[str, ...]] = (*GatedConfig.acting, "temperature", "blind")

    variant: Literal["v2"] = "v2"
    temperature: bool = True
    """One attention temperature per head, set by the evidence; False: gates alone."""
    blind: bool = False
    """Every evidence feature reads as zero. A control: the same size, without the evidence."""
    vision: str | None = None
    """The controller also reads what this vision tower sees (its `encoder_id`); another's numbers are refused."""
    alignment: float = Field(default=0.1, ge=0)
    """Weight of the penalty (mean gate - margin_scale * margin of the evidence)^2."""
    margin_scale: float = Field(default=2.0, gt=0)
    """Gate magnitude that belongs to a margin of 1."""


class KroneckerConfig(ScaledConfig):
    """v3: a sum of Kronecker products at the MLP."""

    variant: Literal["v3"] = "v3"
    spectral_cap: float | None = Field(default=1.0, gt=0)
    """Largest singular value of each update, in the units of the weight. None: free."""


class FilmConfig(AdapterConfig):
    """v4: FiLM on the residual stream."""

    acting: ClassVar[tuple[str, ...]] = ("chunk_size", "router_layer", "film_range")

    variant: Literal["v4"] = "v4"
    film_range: Literal["narrow", "wide"] = "narrow"
    """gamma in [0.8, 1.2] and |beta| <= 0.1, or gamma in [0.5, 2] and |beta| <= 0.5."""


KINDS: dict[str, type[AdapterConfig]] = {
    "s0": StaticConfig,
    "pt1": HeadGateConfig,
    "v1": RankMaskConfig,
    "v2": GateShapingConfig,
    "v3": KroneckerConfig,
    "v4": FilmConfig,
}
"""Kind -> its section. The modules of each are made in `bem.adapters.build`."""
VARIANTS = tuple(KINDS)


def parse_adapter(
    values: Mapping[str, Any], where: str, kinds: Mapping[str, type[AdapterConfig]] | None = None
) -> AdapterConfig:
    """Validate knobs as the section of their `variant` (s0 if there is none).

    Args:
        values: knob -> value.
        where: stands at the beginning of every message.
        kinds: variant -> section; None: `KINDS`.
    Raises:
        ConfigError: no such variant, a knob of another variant (says whose), an unknown knob (names the
            nearest) or a bad value.
    """
    kinds = KINDS if kinds is None else kinds
    variant = values.get("variant", "s0")
    if not isinstance(variant, str) or variant not in kinds:
        raise ConfigError(
            f"{where}.variant: unknown variant {variant!r}: use one of {', '.join(kinds)}."
        )
    section = kinds[variant]
    for knob in values:
        owners = [kind for kind, other in kinds.items() if knob in other.model_fields]
        if owners and variant not in owners:
            raise ConfigError(
                f"{where}: {knob!r} is a knob of {', '.join(owners)}, not of {variant}. Leave it out."
            )
    return parse(section, dict(values), where)


class TrainingConfig(Section):
    """How an adapter is fitted. An arm and the experts may change some of it."""

    steps: int = Field(default=200, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=16, ge=1)
    """Examples per optimiser step, over all accumulated micro-batches."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches per optimiser step at least."""
    padding: float = Field(default=0.1, ge=0, le=1)
    """Largest share of a step's tokens that may be padding: more micro-batches are made to keep it. 1: never."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps with a linearly rising learning rate; then cosine to a tenth."""
    clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    max_length: int = Field(default=512, ge=8)
    """Longest sequence in tokens; longer prompts lose their beginning, longer answers are refused."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between resumable states."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast precision of the forward pass."""
    patience: int | None = Field(default=None, ge=1)
    """Early stopping: training ends after so many looks at the validation rows without a lower loss, and
    goes back to the lowest. Needs `data.validation_rows`. None: all steps are taken, the last one counts."""
    evaluate_every: int = Field(default=50, ge=1)
    """Steps between two such looks."""
