"""A whole experiment: arms, gates, and the YAML file that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, model_validator

from bem.config.adapters import KINDS, AdapterConfig, TrainingConfig, parse_adapter
from bem.config.arm import KNOBS, LABELLED, ArmConfig, refuse_without_effect
from bem.config.data import DataConfig
from bem.config.overrides import apply_override
from bem.config.routing import RoutingConfig
from bem.config.section import Section, Seed, parse
from bem.config.tuning import TuningConfig
from bem.errors import ConfigError


class GatesConfig(Section):
    """What a candidate must pass to be promoted."""

    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Level of the intervals and of the false discovery rate."""
    n_bootstrap: int = Field(default=10_000, ge=100)
    """Bootstrap resamples."""
    seed: Seed = 0
    """Seed of the resampling."""
    quality_margin: float = Field(default=0.0, ge=0)
    """A gain counts only beyond this many points."""
    regression_margin_points: float = Field(default=0.5, ge=0)
    """No core metric's lower limit may lie further below the baseline, in points."""
    relative_margin: float = Field(default=0.1, ge=0)
    """The same for metrics without points (loss, seconds), as a share of the baseline's mean."""
    slice_margin_points: float = Field(default=1.0, ge=0)
    """Non-inferiority margin of each named slice, in points."""
    severe_loss_points: float = Field(default=5.0, gt=0)
    """A loss that alike slices or metrics cannot excuse: a part of at least `severe_loss_examples`
    must exclude it by its own scores, one-sided at `alpha`; so a part that has truly lost so much is
    promoted with probability `alpha` at most. Never less than the margin of the part."""
    severe_loss_examples: int = Field(default=200, ge=1)
    """Smaller parts cannot exclude it, however alike they are; they rest on the others."""
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
    reported_metrics: tuple[str, ...] = ()
    """Metrics that no guard looks at; every verdict lists them."""
    waived: tuple[
        Literal["budget", "latency", "memory", "kv_hit", "router", "index_swap", "slices"], ...
    ] = ()
    """Gates that do not apply (score files alone have no costs, tasks without retrieval no index to
    swap); every verdict lists them."""


class ExperimentConfig(Section):
    """A whole experiment: `bem run` trains, measures, judges and reports it."""

    open_keys: ClassVar[Mapping[str, Sequence[str]]] = {"adapters": KNOBS}

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Folder of the run under `output`."""
    output: str = "runs"
    """Folder that holds all runs."""
    base: str = "bem-tiny"
    """A name of `bem base list`, a folder, a .gguf file, or a Hugging Face id."""
    dtype: Literal["auto", "float32", "bfloat16", "int4"] | None = None
    """Of the base's weights; auto: as they were saved; None: float32 on CPU, bfloat16 elsewhere; int4:
    bfloat16, and four bits a weight where few rows are computed (CPU)."""
    data: DataConfig
    adapters: dict[str, Any] = {}
    """Defaults of every arm: knobs of any variants, each used by the arms whose variant has it."""
    arms: list[ArmConfig] = Field(min_length=1)
    """The arms; exactly one has the role baseline."""
    seeds: list[Seed] = Field(default=[0, 1], min_length=1)
    """Seeds of initial weights and data order; scores are averaged over them within an example."""
    training: TrainingConfig = TrainingConfig()
    tuning: TuningConfig | None = None
    """Search for the learning rate of every arm and of the experts; None: as `training` says."""
    gates: GatesConfig = GatesConfig()
    routing: RoutingConfig | None = None
    """Experts and their routers, for arms with a `route`."""
    latency_rounds: int = Field(default=15, ge=1)
    """Interleaved timing rounds per arm, before any answer is looked at."""
    latency_rounds_max: int | None = Field(default=None, ge=1)
    """Most rounds, while a candidate's latency gate is open. None: six times `latency_rounds`."""
    latency_seconds_max: float = Field(default=600.0, gt=0)
    """Further rounds begin only within this time, in seconds, of all timing."""
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
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: each one counts once")
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
            refuse_without_effect(arm)
        if self.routing is not None and self.routing.checkpoint is not None:
            self.routing.check_routes([arm.route for arm in self.arms if arm.route])
        self._adapters_make_sense()
        self._training_makes_sense()
        return self

    def _training_makes_sense(self) -> None:
        own = [arm for arm in self.arms if arm.is_trained]
        trained = {f"arms.{arm.name}.": self.training_of(arm) for arm in own}
        if any(arm.route for arm in self.arms) and self.trains_experts:
            trained["routing."] = self.expert_training
        if self.data.validation_rows is None:
            self._refuse_without_validation(trained)
        elif not self._chooses(trained):
            raise ValueError(
                "data.validation_rows are for choosing, and nothing is chosen: add `tuning` or "
                "`training.patience`, or leave them out"
            )
        if self.tuning is not None:
            self._refuse_odd_tuning(self.tuning, trained)

    def _chooses(self, trained: Mapping[str, TrainingConfig]) -> bool:
        xlora = [self.training] if any(arm.route == "xlora" for arm in self.arms) else []
        return self.tuning is not None or any(t.patience for t in (*trained.values(), *xlora))

    def _refuse_without_validation(self, trained: Mapping[str, TrainingConfig]) -> None:
        if self._chooses(trained):
            what = "tuning" if self.tuning is not None else "training.patience"
            raise ValueError(
                f"{what} needs rows that are neither trained on nor reported: set data.validation_rows"
            )

    def _refuse_odd_tuning(
        self, tuning: TuningConfig, trained: Mapping[str, TrainingConfig]
    ) -> None:
        if not trained:
            raise ValueError("tuning has no effect: no adapter is trained here. Remove it")
        if "routing." in trained and "arms.experts." in trained:
            raise ValueError(
                "arms.experts: beside `tuning` the experts of `routing` are recorded under this name. Give the arm "
                "another one"
            )
        changes = {f"arms.{arm.name}.": arm.training for arm in self.arms}
        changes["routing."] = self.routing.training if self.routing else {}
        for where, training in trained.items():
            if tuning.steps > training.steps:
                raise ValueError(
                    f"tuning.steps {tuning.steps} exceed the {training.steps} of {where}training.steps"
                )
            if "learning_rate" in changes[where]:
                raise ValueError(
                    f"{where}training.learning_rate has no effect beside `tuning`, which chooses it. Remove one"
                )

    def _adapters_make_sense(self) -> None:
        parse_adapter({"variant": self.adapters.get("variant", "s0")}, "adapters")
        own = [self.adapter_of(arm) for arm in self.arms if arm.has_adapter]
        used = {knob for adapter in own for knob in type(adapter).model_fields}
        if own and (unused := sorted(self.adapters.keys() - used)):
            raise ConfigError(
                f"adapters: {unused[0]!r} is a knob of no arm's variant. Leave it out."
            )

    @model_validator(mode="after")
    def _rounds_make_sense(self) -> ExperimentConfig:
        if self.latency_rounds_max is not None and self.latency_rounds_max < self.latency_rounds:
            raise ValueError(
                f"latency_rounds_max {self.latency_rounds_max} is below latency_rounds {self.latency_rounds}"
            )
        return self

    @property
    def most_latency_rounds(self) -> int:
        """Rounds after which timing ends, whatever is open."""
        return self.latency_rounds_max or 6 * self.latency_rounds

    @property
    def baseline(self) -> ArmConfig:
        """The one arm that all others are compared with."""
        return next(arm for arm in self.arms if arm.role == "baseline")

    @property
    def trains_experts(self) -> bool:
        """There are experts, and they are not taken as they were saved."""
        return self.routing is not None and self.routing.checkpoint is None

    @property
    def trains(self) -> bool:
        """Anything is trained at all (X-LoRA's classifier for one)."""
        routes = {arm.route for arm in self.arms} - {None}
        own = any(arm.is_trained for arm in self.arms) or bool(routes & {"xlora", *LABELLED})
        return own or bool(routes and self.trains_experts)

    @property
    def reads_training_rows(self) -> bool:
        """Something is trained on them, or shows them as examples."""
        return self.trains or any(arm.shots for arm in self.arms)

    def adapter_of(self, arm: ArmConfig) -> AdapterConfig:
        """The adapter of one arm: the shared defaults that its variant has, with the arm's changes.

        An arm with a route has experts instead, a bare one nothing; its adapter is not used. Raises
        ConfigError.
        """
        variant = arm.adapters.get("variant", self.adapters.get("variant", "s0"))
        section = KINDS.get(variant) if isinstance(variant, str) else None
        owned = section.model_fields if section else {}
        foreign = {knob for kind in KINDS.values() for knob in kind.model_fields} - owned.keys()
        shared = {knob: value for knob, value in self.adapters.items() if knob not in foreign}
        where = f"arms.{arm.name}.adapters" if arm.adapters else "adapters"
        return parse_adapter({**shared, **arm.adapters}, where)

    def training_of(self, arm: ArmConfig) -> TrainingConfig:
        """How one arm's adapter is fitted: `training` with the arm's changes. Raises ConfigError."""
        changed = {**self.training.model_dump(), **arm.training}
        return parse(TrainingConfig, changed, f"arms.{arm.name}.training")

    @property
    def expert_training(self) -> TrainingConfig:
        """How the experts of `routing` are fitted: `training` with its changes. Raises ConfigError."""
        changes = {} if self.routing is None else self.routing.training
        return parse(TrainingConfig, {**self.training.model_dump(), **changes}, "routing.training")

    def variant_of(self, arm: ArmConfig) -> str:
        """Kind of the arm's adapter, or `routed`, or `base` for the bare one."""
        if arm.is_bare:
            return "base"
        return "routed" if arm.route else self.adapter_of(arm).variant


def load(path: str | Path, overrides: list[str] | None = None) -> ExperimentConfig:
    """Read an experiment from YAML and apply overrides such as `training.steps=50` (see `overrides`).

    Raises:
        ConfigError: no such file, not YAML, an unknown key (the nearest is named) or a bad value.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"No config file at {path}. Shipped ones lie in configs/.")
    values = _mapping(path, "sections")
    for override in overrides or []:
        apply_override(values, override)
    where = f"{path} with {', '.join(overrides)}" if overrides else str(path)
    return parse(ExperimentConfig, values, where)


def load_gates(path: str | Path | None) -> GatesConfig:
    """Gates from YAML: the keys to change, alone or under `gates`; None: the defaults.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (the nearest is named) or a bad value.
    """
    if path is None:
        return GatesConfig()
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"No gates file at {path}.")
    values = _mapping(path, "gates")
    gates = values.get("gates", values)
    if not isinstance(gates, dict | None):
        raise ConfigError(f"{path} must hold a mapping of gates, found {type(gates).__name__}.")
    return parse(GatesConfig, gates or {}, str(path))


def _mapping(path: Path, of: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of {of}, found {type(values).__name__}.")
    return values
