"""Every arm as it will be trained: its rank, the layers that it adapts, and what decides in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bem.adapters.budget import match_rank, price
from bem.adapters.sites import find_linears, find_sites
from bem.config import AdapterConfig, ArmConfig, ExperimentConfig, RoutingConfig
from bem.config.adapters import StaticConfig, parse_adapter
from bem.errors import CheckpointError, ConfigError
from bem.files import read_json
from bem.releases.named import router_of, static_of
from bem.report.words import shots
from bem.routing.mounted import check_files
from bem.stats.scores import METRICS
from bem.tasks.load import Task
from bem.tasks.scoring import QUALITY


@dataclass(frozen=True)
class Layers:
    """Which decoder layers of the base an adapter acts on."""

    adapted: tuple[int, ...]
    """From 0, bottom to top."""
    of: int
    """Layers of the base."""

    def __str__(self) -> str:
        """`layers 7 to 29 of 30, counted from 0`."""
        first, last, count = self.adapted[0], self.adapted[-1], len(self.adapted)
        if count == self.of:
            return f"all {self.of} layers"
        span = f"layer {first}" if count == 1 else f"layers {first} to {last}"
        some = "" if count == last - first + 1 else f" ({count} of them)"
        return f"{span}{some} of {self.of}, counted from 0"


@dataclass(frozen=True)
class Plan:
    """One arm as it will be trained: with the rank that meets the baseline's budget."""

    arm: ArmConfig
    adapter: AdapterConfig | None
    """None: the arm has a route, its experts are those of `routing`; or it is the bare base."""
    layers: Layers | None
    """None: the bare base."""

    def record(self) -> dict[str, Any]:
        """What the report is told of it."""
        return {"layers": str(self.layers)} if self.layers else {}

    def summary(self) -> str:
        """`v1, rank 9, layers 1 to 3 of 4, counted from 0`."""
        if self.arm.shots is not None:
            return f"the bare base, {shots(self.arm.shots)}"
        if self.adapter is None:
            return f"experts, route {self.arm.route}, {self.layers}"
        knobs = self.adapter.model_dump()  # not every variant has a rank for each of its sites
        by_site = [knobs.get("rank_attn"), knobs.get("rank_mlp")]
        ranks = [self.adapter.rank if rank is None else rank for rank in by_site]
        rank = " / ".join(map(str, dict.fromkeys(ranks)))
        return f"{self.adapter.variant}, rank {rank}, {self.layers}"


def plan_arms(model: Any, config: ExperimentConfig) -> list[Plan]:
    """Every arm with its rank chosen to cost what the baseline costs, in what it is matched on.

    Raises:
        ConfigError: a rank cannot be matched to a baseline that has a route.
        AttachError: the model has no sites, or no rank meets the budget.
    """
    return [_plan(model, config, arm) for arm in config.arms]


def _plan(model: Any, config: ExperimentConfig, arm: ArmConfig) -> Plan:
    if arm.is_bare:
        return Plan(arm, None, None)
    if arm.route:
        assert config.routing is not None
        return Plan(arm, None, expert_layers(model, config.routing))
    if arm.checkpoint is not None:
        adapter = saved_adapter(config, arm)
        return Plan(arm, adapter, adapted_layers(model, adapter))
    adapter = config.adapter_of(arm)
    if arm.role != "baseline" and arm.match != "none":
        if config.baseline.route:
            raise ConfigError(
                f"Arm {arm.name}: its rank cannot be matched to {config.baseline.name}, which has a route. "
                "Set `match: none` and its rank."
            )
        target = price(model, config.adapter_of(config.baseline))
        tolerance = config.gates.budget_tolerance
        adapter = match_rank(model, adapter, target, on=arm.match, tolerance=tolerance)
    return Plan(arm, adapter, adapted_layers(model, adapter))


def saved_adapter(config: ExperimentConfig, arm: ArmConfig) -> AdapterConfig:
    """The adapter of an arm's checkpoint, by its manifest.

    Raises:
        CheckpointError: there is none, or no such folder or release.
        ConfigError: it is of another variant than the arm.
    """
    assert arm.checkpoint is not None
    path = static_of(arm.checkpoint) / "manifest.json"
    if not path.is_file():
        raise CheckpointError(
            f"Arm {arm.name}: {arm.checkpoint} holds no saved adapter: there is no manifest.json (looked in "
            f"{path.parent.resolve()}). A plain PEFT LoRA gets one from `bem.load(base, folder).save(...)`."
        )
    manifest = read_json(path, CheckpointError)
    values = manifest.get("adapter") if isinstance(manifest, dict) else None
    if values is None:
        raise ConfigError(
            f"Arm {arm.name}: {arm.checkpoint} holds no single adapter of ours. A router is taken over by "
            "routing.checkpoint."
        )
    adapter = parse_adapter(values, str(path))
    if adapter.variant != config.variant_of(arm):
        raise ConfigError(
            f"Arm {arm.name}: {arm.checkpoint} holds the variant {adapter.variant}. Say so: "
            f"adapters: {{variant: {adapter.variant}}}"
        )
    return adapter


def expert_layers(model: Any, routing: RoutingConfig) -> Layers:
    """The layers that experts act on: those that will be trained, or those that were saved.

    Raises:
        CheckpointError: `routing.checkpoint` holds no router.
        ConfigError: its experts act on layers that this base does not have.
    """
    if routing.checkpoint is None:
        expert = StaticConfig(rank=routing.expert_rank, router_layer=routing.router.router_layer)
        return adapted_layers(model, expert)
    sites = find_linears(model)
    layer_of = {site.name: site.layer for site in sites.found}
    saved = check_files(router_of(routing.checkpoint))["version"]["sites"]
    if foreign := [name for name in saved if name not in layer_of]:
        raise ConfigError(
            f"routing.checkpoint {routing.checkpoint} has experts on {foreign[0]}, which this base does not have: it "
            "was made for another one."
        )
    return Layers(tuple(sorted({layer_of[name] for name in saved})), len(sites.blocks))


def adapted_layers(model: Any, adapter: AdapterConfig) -> Layers:
    """The layers that hold a module of the adapter (its controller aside)."""
    sites = find_sites(model, adapter.sites)
    layer_of = {site.name: site.layer for site in sites.found}
    priced = {name for name, *_ in price(model, adapter).rows}
    layers = {layer_of[name] for name in priced & layer_of.keys()}
    return Layers(tuple(sorted(layers)), len(sites.blocks))


def primary_metrics(tasks: Sequence[Task]) -> list[str]:
    """The family that is declared before looking: overall quality, then the tasks' own metrics.

    Quality is each row's own primary metric; if all rows share one, it is that one.
    """
    primary = list(dict.fromkeys(task.primary for task in tasks if METRICS[task.primary].core))
    alike = len(primary) == 1 and all(task.primary == primary[0] for task in tasks)
    return primary if alike else [QUALITY, *primary]
