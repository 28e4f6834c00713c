"""Experts, the router between them, and how it learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from bem.config.adapters import TrainingConfig
from bem.config.section import Folder, Section, Seed


class RouterConfig(Section):
    """What the agentic router may choose at a chunk boundary, and what holds it back.

    An action is (expert, span, rank budget, strength); option 0 of the expert is the bare base.
    """

    spans: tuple[int, ...] = (1, 2, 4)
    """Chunks that an action may last; a turn start ends it."""
    ranks: tuple[int, ...] | None = None
    """Rank budgets: most important ranks kept at each site. None: all of them, nothing to choose, because
    no choice was found that is worth anything (benchmarks/results/heads.md)."""
    strengths: tuple[float, ...] = (1.0,)
    """Factors on the whole update (the source's bias scale). Alone by default for the same reason."""
    plan_length: int = Field(default=3, ge=1)
    """Most different actions between two turn starts; the last one then holds."""
    switch_cost: float = Field(default=0.1, ge=0)
    """What changing the expert costs, in the units of Q (nats per answer token after cloning)."""
    hysteresis: float = Field(default=0.1, ge=0)
    """An expert is left only for one whose Q is better by more than switch_cost + hysteresis."""
    flip_rate_max: float = Field(default=0.2, ge=0)
    """Changes of expert allowed per chunk on average, beyond `flip_burst` ..."""
    flip_burst: int = Field(default=3, ge=0)
    """... changes that are free in every conversation."""
    confidence: float = Field(default=0.0, ge=0, le=1)
    """Below this probability of the chosen expert its gate fades towards `fallback`. 0: never."""
    shared: str | None = None
    """Expert that always acts, beside the chosen one; it cannot be chosen. None: there is none."""
    fallback: str | None = None
    """Expert that takes the rest of a faded gate; None: the bare base."""
    trust_radius: float | None = Field(default=None, gt=0)
    """Largest norm of the composed update of a site in any chunk. None: not projected."""
    trust_norm: Literal["frobenius", "spectral"] = "frobenius"
    """Norm of the trust region."""
    trust_relative: bool = False
    """Radius in units of the frozen weight's norm instead of absolute."""
    orthogonal: bool = False
    """Each expert trains in output directions of its own."""
    chunk_size: int = Field(default=64, ge=1)
    """Tokens for which one action holds at least; chunks also restart at every turn."""
    router_layer: int | None = Field(default=None, ge=0)
    """Layer whose input the router reads. None: a quarter of the way up, or the lowest layer that
    an expert adapts if that is lower."""
    evidence: bool = False
    """The router also reads how good the retrieved evidence is."""
    vision: str | None = None
    """The router also reads what this vision tower sees (its `encoder_id`); another tower's numbers are refused."""
    d_read: int = Field(default=32, ge=1)
    """Width of the per-token projection that the router's memory is made of."""
    memory: int = Field(default=48, ge=1)
    """Width of its memory of the text, carried from chunk to chunk."""
    hidden: int = Field(default=48, ge=1)
    """Width of the policy's and the critic's hidden layer."""
    seed: Seed = 0
    """Seed of the policy's initial weights."""

    @model_validator(mode="after")
    def _options_make_sense(self) -> RouterConfig:
        for name in ("spans", "ranks", "strengths"):
            options = getattr(self, name)
            if options is None:
                continue
            if not options or any(o <= 0 for o in options) or list(options) != sorted(set(options)):
                raise ValueError(f"{name} must be positive and increasing, got {list(options)}")
        return self


class ReadingConfig(Section):
    """How the router's reader and its memory are trained, before cloning."""

    tries: int = Field(default=4, ge=1)
    """Starts from different weights; the best on the validation conversations is kept."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the traced conversations, of each start."""
    batch_size: int = Field(default=32, ge=1)
    """Conversations per optimiser step."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Peak learning rate of AdamW; falls to 0 along a cosine."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Of the hidden states that are read and of the memory."""


class CloningConfig(Section):
    """AR0: the router learns from oracle traces by behavioural cloning."""

    rows: int = Field(default=400, ge=8)
    """Training conversations that are traced under every expert."""
    validation: float = Field(default=0.15, gt=0, lt=1)
    """Share of the traced conversations that choose the reader's start and every epoch."""
    held_out: float = Field(default=0.15, gt=0, lt=1)
    """Share that chooses nothing: accuracy is stated on it alone. The rest trains."""
    switch_cost: float = Field(default=0.1, ge=0)
    """Cost of a change of expert in the oracle, in nats per answer token of a turn."""
    rank_cost: float = Field(default=0.05, ge=0)
    """Cost of using all ranks of a site, in the same units."""
    margin: float = Field(default=0.1, ge=0)
    """Rank budget and strength leave the plain option (all ranks, as trained) only for a saving of more
    than this, in the same units: one answer's loss is too noisy to follow every difference."""
    epochs: int = Field(default=60, ge=1)
    """Passes over the traces."""
    batch_size: int = Field(default=128, ge=1)
    """Decisions per optimiser step."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Learning rate of AdamW."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Of the policy's and the critic's inputs and hidden layer, while they are cloned."""
    regret: float = Field(default=10.0, ge=0)
    """Weight of the expected regret of the expert head, in nats, beside 1 for its cross-entropy: ties
    between experts carry no signal."""
    largest_regret: float = Field(default=1.0, gt=0)
    """Regret against the best expert counts, and Q is learned, up to this many nats."""
    other_heads: float = Field(default=0.3, ge=0)
    """Weight of span, rank budget and strength in the loss, beside 1 for the expert."""
    reading: ReadingConfig = ReadingConfig()
    rounds: int = Field(default=1, ge=0)
    """Times that the trained router's own states are traced and labelled too (DAgger)."""

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> CloningConfig:
        if self.validation + self.held_out >= 1:
            raise ValueError(
                f"validation {self.validation} and held_out {self.held_out} leave nothing to train on: "
                "their sum must be below 1"
            )
        return self


class RewardConfig(Section):
    """What an episode of AR1 is worth: weights of the answer's scores, minus costs."""

    quality: float = Field(default=1.0, ge=0)
    """Weight of the task's primary metric, on [0, 1]."""
    em: float = Field(default=0.0, ge=0)
    """Weight of the exact match."""
    f1: float = Field(default=0.0, ge=0)
    """Weight of F1."""
    validity: float = Field(default=0.1, ge=0)
    """Weight of a well-formed answer."""
    tool: float = Field(default=0.0, ge=0)
    """Weight of a right call; rows of other tasks get none."""
    flip_cost: float = Field(default=0.01, ge=0)
    """Cost of each change of expert."""
    rank_cost: float = Field(default=0.005, ge=0)
    """Cost of each chunk under all ranks; under fewer in proportion."""


class PolicyGradientConfig(Section):
    """AR1: trust region policy optimisation on real generations."""

    iterations: int = Field(default=20, ge=0)
    """Policy steps."""
    episodes: int = Field(default=128, ge=2)
    """Generated answers per step."""
    samples: int = Field(default=4, ge=1)
    """Answers to the same conversation among them; each is judged against the others."""
    batch_size: int = Field(default=32, ge=1)
    """Answers generated at once."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Longest answer of an episode, in tokens."""
    delta: float = Field(default=0.01, gt=0)
    """Largest mean KL of a step, in nats."""
    damping: float = Field(default=0.1, ge=0)
    """Added to the Fisher matrix."""
    cg_iterations: int = Field(default=10, ge=1)
    """Conjugate gradient iterations."""
    backtracks: int = Field(default=10, ge=1)
    """Steps tried by the line search."""
    gamma: float = Field(default=0.99, gt=0, le=1)
    """Discount per chunk."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Lambda of the advantage estimate."""
    value_epochs: int = Field(default=10, ge=1)
    """Passes over a batch to fit the value."""
    value_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the value."""
    reward: RewardConfig = RewardConfig()
    collapse_share: float = Field(default=0.9, gt=0, le=1)
    """Alarm: one expert governs more than this share of the chunks ..."""
    collapse_entropy: float = Field(default=0.02, ge=0)
    """... or the policy's mean entropy falls below this, in nats."""

    @model_validator(mode="after")
    def _whole_groups(self) -> PolicyGradientConfig:
        if self.episodes % self.samples:
            raise ValueError(
                f"episodes {self.episodes} must be a multiple of samples {self.samples}: every "
                "conversation is answered equally often"
            )
        return self


class RoutingConfig(Section):
    """Experts of an experiment and the routers over them, shared by all arms with a `route`."""

    open_keys: ClassVar[Mapping[str, Sequence[str]]] = {
        "training": tuple(TrainingConfig.model_fields)
    }

    experts: dict[str, list[str]] = {}
    """Expert -> skills that it is trained on; {}: one expert per skill (a task, or "task/ask")."""
    expert_rank: int = Field(default=8, ge=1)
    """Rank of each expert at each site."""
    shared_rank: int = Field(default=0, ge=0)
    """Rank of an expert that always acts, beside the chosen one. 0: there is none."""
    checkpoint: Folder | None = None
    """Folder of a saved router with its experts, or the name of a release (`bem-smol`): taken as they are,
    under all routes but ar0 and single; ar1 is the router that was saved. None: they are trained."""
    training: dict[str, Any] = {}
    """Changes to the experiment's `training` for the experts, which are trained together: {steps: 400}."""
    router: RouterConfig = RouterConfig()
    cloning: CloningConfig = CloningConfig()
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()
    labelled_rows: int | None = Field(default=None, ge=1)
    """Training conversations whose labels the routes fitted, linear and encoder learn from; fewer where there are
    fewer. None: those that are traced, `cloning.rows`."""
    encoder: str = Field(default="minilm", min_length=1)
    """What the route `encoder` reads turns with: a sentence-transformers model (`minilm`, a folder, a Hugging Face
    id; extra `retrieval`), or `base:NAME` for a base model's own pooled states."""
    peer_steps: int = Field(default=50, ge=1)
    """Optimiser steps of X-LoRA's classifier."""

    def check_routes(self, routes: Sequence[str]) -> None:
        """Raise ValueError for what a `checkpoint` leaves without effect or cannot serve."""
        if others := sorted({"ar0", "single"} & set(routes)):
            raise ValueError(
                f"route {others[0]} needs stages that routing.checkpoint does not hold. Remove the arm, or the "
                "checkpoint"
            )
        if self.training:
            raise ValueError("routing.training has no effect with routing.checkpoint. Remove one")
        for part in ("router", "policy_gradient"):
            if getattr(self, part) != type(self).model_fields[part].default:
                raise ValueError(
                    f"routing.{part} has no effect with routing.checkpoint, whose router is taken as it is. Remove it"
                )
        if not self.experts:
            raise ValueError(
                "routing.checkpoint needs routing.experts: which expert serves which skill of the tasks"
            )
