"""What is attached to the frozen base, and how it is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bem.config.section import Section

VARIANTS = ("s0", "pt1", "v1", "v2", "v3", "v4")
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


class AdapterConfig(Section):
    """What is attached to the frozen base, and where."""

    variant: Literal["s0", "pt1", "v1", "v2", "v3", "v4", "routed"] = "s0"
    """s0 static LoRA | pt1 head-group gate | v1 pt1 + dynamic rank mask | v2 pt1 + shaping by evidence
    | v3 Kronecker | v4 FiLM | routed: experts side by side, made by `bem.mount` alone."""
    rank: int = Field(default=8, ge=1)
    """Rank of the update at each site (v3: number of Kronecker terms; v4: width of the modulation)."""
    alpha: float | None = Field(default=None, gt=0)
    """Update scale is alpha / rank. None: 2 * rank, so a scale of 2."""
    rank_attn: int | None = Field(default=None, ge=0)
    """Rank at the attention output alone; None: `rank`. 0 leaves the site out."""
    rank_mlp: int | None = Field(default=None, ge=0)
    """Rank at the MLP down projection alone; None: `rank`. 0 leaves the site out."""
    head_groups: int = Field(default=4, ge=1)
    """Head groups of pt1 and v1; the nearest divisor of n_heads is taken."""
    k_active: int | None = Field(default=None, ge=1)
    """Active ranks per chunk of v1. None: rank // 2."""
    mask: Literal["learned", "random", "fixed"] = "learned"
    """Who chooses the ranks of v1; random and fixed are its controls."""
    mask_temperature: float = Field(default=1.0, gt=0)
    """Temperature of the Gumbel top-k relaxation while v1 trains."""
    temperature: bool = True
    """v2: one attention temperature per head, set by the evidence; False: gates alone."""
    blind: bool = False
    """v2: every evidence feature reads as zero. Its control: the same size, without the evidence."""
    alignment: float = Field(default=0.1, ge=0)
    """v2: weight of the loss that draws the gates' magnitude to the evidence's margin."""
    margin_scale: float = Field(default=2.0, gt=0)
    """v2: gate magnitude that belongs to a margin of 1."""
    film_range: Literal["narrow", "wide"] = "narrow"
    """v4: gamma in [0.8, 1.2] and |beta| <= 0.1, or gamma in [0.5, 2] and |beta| <= 0.5."""
    chunk_size: int = Field(default=64, ge=1)
    """Tokens for which one control holds; chunks also restart at every turn."""
    router_layer: int | None = Field(default=None, ge=0)
    """Layer whose input the controller reads; sites of this layer and above are adapted.
    None: a quarter of the way up. 0: the embeddings."""
    d_control: int = Field(default=32, ge=1)
    """Width of the controller's code z."""
    spectral_cap: float | None = Field(default=1.0, gt=0)
    """v3: largest singular value of each Kronecker update, in the units of the weight."""
    trust_radius: float | None = Field(default=None, gt=0)
    """Largest Frobenius norm of a site's update in any chunk. None: not projected."""
    trust_relative: bool = False
    """Radius in units of the frozen weight's Frobenius norm instead of absolute."""
    decorrelation: float = Field(default=0.0, ge=0)
    """Weight of the penalty on the correlation between head-group gates (pt1, v1)."""
    sites: dict[str, str | list[str]] | None = None
    """Override of the site search: {'attn_out': pattern, 'mlp_down': pattern}, glob or regex."""
    seed: int = 0
    """Seed of the initial weights."""


class TrainingConfig(Section):
    """How an adapter is fitted. All arms of an experiment share one of these."""

    steps: int = Field(default=200, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=16, ge=1)
    """Examples per optimiser step, over all accumulated micro-batches."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches per optimiser step."""
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
