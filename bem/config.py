"""Every knob of BEM, with its unit.

A config is frozen, refuses keys it does not know (and names the nearest one), and is loaded from YAML:

    cfg = load("configs/quickstart.yaml", ["training.steps=50", "adapters.rank=8"])

The classes here hold plain values only; modules take plain numbers, never a config object.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bem.errors import ConfigError

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


class Section(BaseModel):
    """A part of the config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


S = TypeVar("S", bound=Section)


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


class RouterConfig(Section):
    """What the agentic router may choose at a chunk boundary, and what holds it back.

    An action is (expert, span, rank budget, strength); option 0 of the expert is the bare base.
    """

    spans: tuple[int, ...] = (1, 2, 4)
    """Chunks that an action may last; a turn start ends it."""
    ranks: tuple[int, ...] | None = None
    """Rank budgets: most important ranks kept at each site. None: a quarter, a half, all of the
    largest expert's."""
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5)
    """Factors on the whole update (the source's bias scale)."""
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
    d_read: int = Field(default=32, ge=1)
    """Numbers that the router hears of each token."""
    memory: int = Field(default=48, ge=1)
    """Width of its memory of what was said, carried from chunk to chunk."""
    hidden: int = Field(default=48, ge=1)
    """Width of the policy's and the critic's hidden layer."""
    seed: int = 0
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


class ReadingConfig(Section):
    """How the router's reader and its memory are trained, before anything is cloned."""

    tries: int = Field(default=4, ge=1)
    """Starts from different weights; the best on held-out conversations is kept."""
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
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of the traces on which accuracy is stated and training is stopped."""
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
    """Weight of the expected regret of the expert head, in nats, beside 1 for its cross-entropy: which
    of two equally good experts the oracle took teaches nothing."""
    largest_regret: float = Field(default=1.0, gt=0)
    """Regret against the best expert counts, and Q is learned, up to this many nats."""
    other_heads: float = Field(default=0.3, ge=0)
    """Weight of span, rank budget and strength in the loss, beside 1 for the expert."""
    reading: ReadingConfig = ReadingConfig()
    rounds: int = Field(default=1, ge=0)
    """Times that the trained router's own states are traced and labelled too (DAgger)."""


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


class RetrievalConfig(Section):
    """Where a task's evidence comes from, and how it is judged before the model sees it."""

    source: Literal["corpus", "row"] = "corpus"
    """corpus: search all passages; row: rank the passages that each row carries."""
    index: str | None = None
    """Folder made by `bem index build`; None: an index of the rows' passages and of `corpora`."""
    corpora: list[str] = []
    """JSONL files with further passages, searched beside those of the rows."""
    method: Literal["bm25", "dense", "hybrid"] = "bm25"
    """First-stage search; dense and hybrid need an `index` with vectors."""
    candidates: int = Field(default=20, ge=1)
    """Passages that the first stage hands to the reranker."""
    shown: int = Field(default=3, ge=1)
    """Passages that go into the prompt."""
    keep_order: bool = False
    """Show passages in the order of the row instead of the best first (a story)."""
    reranker: str = "tiny"
    """tiny (shipped), none, or a sentence-transformers CrossEncoder by name or folder."""
    withheld: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows whose gold passages are kept from the search: evidence that fails."""
    corrupt_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the sentences that the corrupt index has from other passages."""
    swap: bool = True
    """Measure the held-out rows with a corrupt, a shuffled and no index as well."""
    leak_threshold: float = Field(default=0.8, gt=0, le=1)
    """Held-out rows whose gold passage is this similar to a training one are left out
    (Jaccard of 5-word shingles)."""
    slice_threshold: float = Field(default=0.8, ge=0, le=1)
    """Slice A holds the rows whose evidence has at least this coverage and consistency."""
    seed: int = 0
    """Seed of withheld rows and of the worse indices."""


class TaskConfig(Section):
    """One task family: where its rows come from and how they are scored."""

    name: str
    """Name of a built-in or public task, or of your own."""
    train: str | None = None
    """JSONL (or .gz) file; None: the named task's own file under `data`."""
    dev: str | None = None
    """Held-out JSONL file."""
    metric: str | None = None
    """Primary metric; None: the task's own."""
    metrics: list[str] | None = None
    """Every metric to report; None: the task's own."""
    instruction: str = ""
    """Text put before every input."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest generated answer in tokens."""
    hf_dataset: str | None = None
    """A Hugging Face dataset id (extra `datasets`) instead of files."""
    hf_config: str | None = None
    """Configuration name of that dataset."""
    hf_splits: dict[str, str] = {"train": "train", "dev": "validation"}
    """Which of its splits serve as train and dev."""
    columns: dict[str, str] = {}
    """Mapping of our fields (input, references, evidence, group, id) to its columns."""
    retrieval: RetrievalConfig | None = None
    """Evidence by retrieval; None: the task's own way, for most tasks what stands in the rows."""


class ConversationConfig(Section):
    """Conversations whose turns switch between the skills of all tasks."""

    turns: int = Field(default=4, ge=1)
    """Turns of a conversation, the row's own counted; fewer where they do not fit."""
    switch_rate: float = Field(default=0.7, ge=0, le=1)
    """Probability that the next turn asks for another skill."""
    return_rate: float = Field(default=0.5, ge=0, le=1)
    """Probability that a switch, one turn after another, goes back to the skill before."""
    sticky: bool = True
    """A cue holds until its task is asked for something else; until then it is not shown again."""
    max_characters: int = Field(default=1200, ge=1)
    """Longest conversation, answers included; the oldest turns go first."""
    turn_characters: int = Field(default=720, ge=1)
    """Rows whose own turn is longer than this, with its answer, are left out."""
    seed: int = 0
    """Seed of the choice of skills and of the earlier turns."""

    @model_validator(mode="after")
    def _a_turn_fits(self) -> ConversationConfig:
        if self.turn_characters > self.max_characters:
            raise ValueError(
                f"turn_characters {self.turn_characters} exceed max_characters "
                f"{self.max_characters}: a turn must fit its conversation."
            )
        return self


class DataConfig(Section):
    """Which tasks, and how much of them."""

    root: str | None = None
    """Folder of public sets; None: the suite embedded in the package."""
    tasks: list[str | TaskConfig] = Field(min_length=1)
    """Names of built-in or public tasks, or full task entries."""
    train_rows: int | None = Field(default=None, ge=1)
    """Rows per task for training; None: all."""
    dev_rows: int | None = Field(default=200, ge=1)
    """Held-out rows per task for measuring; None: all."""
    conversations: ConversationConfig | None = None
    """Every row as the last turn of a conversation; None: each row alone."""
    seed: int = 0
    """Seed of the choice of rows and of the training order."""


class GatesConfig(Section):
    """What a candidate must pass to be promoted."""

    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Level of the intervals and of the false discovery rate."""
    n_bootstrap: int = Field(default=10_000, ge=100)
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of the resampling."""
    quality_margin: float = Field(default=0.0, ge=0)
    """A gain counts only beyond this many points."""
    regression_margin_points: float = Field(default=0.5, ge=0)
    """No core metric's lower limit may lie further below the baseline, in points."""
    slice_margin_points: float = Field(default=1.0, ge=0)
    """Non-inferiority margin of each named slice, in points."""
    budget_tolerance: float = Field(default=0.05, ge=0)
    """Allowed relative difference in adapter parameters and in adapter FLOPs per token."""
    allow_cheaper: bool = True
    """A candidate below the tolerance passes the budget gate, with a note."""
    latency_ratio_max: float = Field(default=1.15, gt=0)
    """Largest upper limit of the p50 latency ratio to the baseline."""
    memory_ratio_max: float = Field(default=1.05, gt=0)
    """Largest peak-memory ratio to the baseline."""
    kv_hit_margin_points: float = Field(default=0.5, ge=0)
    """The KV-hit rate may fall by this many points."""
    min_items: int = Field(default=20, ge=1)
    """Fewer examples than this: INCONCLUSIVE."""
    min_discordant: int = Field(default=10, ge=0)
    """Fewer examples that differ than this: INCONCLUSIVE."""
    fdr: Literal["bh", "by"] = "bh"
    """Benjamini-Hochberg, or Benjamini-Yekutieli for arbitrary dependence."""
    power: float = Field(default=0.8, gt=0, lt=1)
    """Power for which the minimal detectable effect and 'n more' are stated."""
    useful_gain_points: float = Field(default=1.0, gt=0)
    """Smallest gain worth promoting, in points; once it can be excluded the candidate is rejected."""
    reported_slices: tuple[str, ...] = ("A",)
    """Slices that are reported only; every other named slice is a guard."""
    waived: tuple[Literal["budget", "latency", "memory", "kv_hit", "router", "slices"], ...] = ()
    """Cost gates that do not apply (score files alone have no costs); every verdict lists them."""


class RoutingConfig(Section):
    """Experts of an experiment and the routers over them, shared by all arms with a `route`."""

    experts: dict[str, list[str]] = {}
    """Expert -> skills that it is trained on; {}: one expert per skill (a task, or "task/ask")."""
    expert_rank: int = Field(default=8, ge=1)
    """Rank of each expert at each site."""
    shared_rank: int = Field(default=0, ge=0)
    """Rank of an expert that always acts, beside the chosen one. 0: there is none."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps for all experts together; None: `training.steps`."""
    router: RouterConfig = RouterConfig()
    cloning: CloningConfig = CloningConfig()
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()
    peer_steps: int = Field(default=50, ge=1)
    """Optimiser steps of X-LoRA's classifier."""


class ArmConfig(Section):
    """One arm of an experiment: a name and what it changes in `adapters` (or no adapter at all)."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name in the report and on disk."""
    adapters: dict[str, Any] = {}
    """Changes to the experiment's `adapters` section."""
    route: (
        Literal[
            "ar0", "ar1", "oracle", "gold", "linear", "single", "random", "wrong", "xlora", "arrow"
        ]
        | None
    ) = None
    """Who chooses between the experts of `routing`: ar0 cloned router | ar1 improved by policy
    gradient | oracle least loss in hindsight | gold the maker's label | linear classifier on mean
    hidden states | single best one expert | random, wrong controls | xlora, arrow PEFT's methods.
    None: no experts, the adapter of this arm."""
    match: Literal["parameters", "flops", "none"] = "parameters"
    """What is held within the budget tolerance of the baseline by choosing the rank."""
    role: Literal["baseline", "candidate", "control"] = "candidate"
    """Controls are measured and shown, never promoted."""
    compare_to: str | None = None
    """Arm that this one is judged against; None: the baseline."""


class ExperimentConfig(Section):
    """A whole experiment: `bem run` trains, measures, judges and reports it."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Folder of the run under `output`."""
    output: str = "runs"
    """Folder that holds all runs."""
    base: str = "bem-tiny"
    """`bem-tiny`, a Hugging Face id or a local folder."""
    data: DataConfig
    adapters: AdapterConfig = AdapterConfig()
    """Defaults of every arm."""
    arms: list[ArmConfig] = Field(min_length=1)
    """The arms; exactly one has the role baseline."""
    seeds: list[int] = Field(default=[0, 1], min_length=1)
    """Seeds of initial weights and data order; scores are averaged over them within an example."""
    training: TrainingConfig = TrainingConfig()
    gates: GatesConfig = GatesConfig()
    routing: RoutingConfig | None = None
    """Experts and their routers, for arms with a `route`."""
    latency_rounds: int = Field(default=15, ge=1)
    """Interleaved timing rounds per arm."""
    eval_batch_size: int = Field(default=16, ge=1)
    """Examples per batch while measuring."""
    threads: int | None = Field(default=None, ge=1)
    """Torch threads of a process; None: torch's own choice, or 1 with several workers."""
    workers: int = Field(default=1, ge=1)
    """Processes that train and measure cells (arm x seed) side by side."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ... or auto."""

    @model_validator(mode="after")
    def _arms_make_sense(self) -> ExperimentConfig:
        names = [arm.name for arm in self.arms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"arm names must be unique; used twice: {', '.join(twice)}")
        baselines = [arm.name for arm in self.arms if arm.role == "baseline"]
        if len(baselines) != 1:
            raise ValueError(f"exactly one arm needs `role: baseline`, found {baselines or 'none'}")
        unknown = [a.compare_to for a in self.arms if a.compare_to and a.compare_to not in names]
        if unknown:
            raise ValueError(
                f"compare_to names no arm: {', '.join(unknown)}. Arms: {', '.join(names)}"
            )
        routed = [arm.name for arm in self.arms if arm.route]
        if routed and self.routing is None:
            raise ValueError(f"arms with a route need a `routing` section: {', '.join(routed)}")
        for arm in self.arms:
            parse(AdapterConfig, {**self.adapters.model_dump(), **arm.adapters}, f"arms.{arm.name}")
        return self

    @property
    def baseline(self) -> ArmConfig:
        """The one arm that all others are compared with."""
        return next(arm for arm in self.arms if arm.role == "baseline")

    def adapter_of(self, arm: ArmConfig) -> AdapterConfig:
        """The adapter section of one arm: the shared defaults with the arm's changes."""
        values = {**self.adapters.model_dump(), **arm.adapters}
        if arm.route:
            values["variant"] = "routed"
        return parse(AdapterConfig, values, arm.name)


def parse(section: type[S], values: dict[str, Any], where: str) -> S:
    """Validate `values` as `section`; a problem becomes one readable ConfigError."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(section, e, where) for e in error.errors())) from None


def load(path: str | Path, overrides: list[str] | None = None) -> ExperimentConfig:
    """Read an experiment from YAML and apply overrides such as `training.steps=50`.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (the nearest is named) or a bad value.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"No config file at {path}. Shipped ones lie in configs/.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, found {type(values).__name__}.")
    for override in overrides or []:
        _override(values, override)
    return parse(ExperimentConfig, values, str(path))


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"Override {override!r} must look like section.key=value.")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"Override {override!r}: {parent!r} is not a section.")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Override {override!r}: the value is not valid YAML: {error}") from None


def _explain(section: type[Section], error: Any, where: str) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(whole)"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] != "extra_forbidden":
        return (
            f"{where}: {key}: {message} (got {error['input']!r:.80})"
            if error["loc"]
            else f"{where}: {message}"
        )
    known = _known_keys(section)
    nearest = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{where}: unknown key {key!r}.{hint}"


def _known_keys(section: type[Section], seen: frozenset[type] = frozenset()) -> list[str]:
    """All keys of a section and of the sections below it."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(name)
        for inner in _sections_in(field.annotation):
            if inner not in seen:
                keys += _known_keys(inner, seen | {inner})
    return keys


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [s for arg in getattr(annotation, "__args__", ()) for s in _sections_in(arg)]
