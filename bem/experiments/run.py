"""Run an experiment: train every arm over seeds, measure, judge, report; skip what is done.

config -> base, tasks, plans (equal budgets) -> cells (arm x seed) -> timings -> verdicts -> report
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import bem
from bem.adapters.attach import attach, load
from bem.adapters.budget import match_rank, price
from bem.adapters.checkpoint import MANIFEST, file_hash
from bem.adapters.copies import with_shared_weights
from bem.adapters.sites import base_hash
from bem.bases import load_base
from bem.config import AdapterConfig, ArmConfig, ExperimentConfig
from bem.errors import ConfigError
from bem.experiments.measuring.answers import QUALITY, context_length, measure
from bem.experiments.measuring.latency import measure_latency, peak_memory
from bem.experiments.routing.arms import keep_facts, opened, reopened
from bem.experiments.routing.stages import Stages
from bem.experiments.workers import run_apart
from bem.report import page as report
from bem.routing.mount import load_router
from bem.routing.mounted import is_router
from bem.runs import machine as environment
from bem.runs import verdicts as judging
from bem.runs.folder import Cell, RunFolder, digest_of, read_json, write_json
from bem.stats import METRICS, Measurement, Verdict, save
from bem.stats.measurement import RouterFacts
from bem.tasks.load import Task, load_tasks, training_mixture
from bem.tasks.retrieval import with_evidence
from bem.training.data import data_hash
from bem.training.fit import STATE, StepMetrics, fit

PROMPT_TOKENS, NEW_TOKENS = 256, 32
"""What is timed: a prefill, and decoding token by token."""


@dataclass(frozen=True)
class Event:
    """Something to show while a run goes on."""

    stage: str
    """What is happening: training, measuring, timing, ..."""
    arm: str = ""
    seed: int = 0
    cell: int = 0
    """Number of the cell, from 1, of `cells`; 0: not about one cell."""
    cells: int = 0
    done: int = 0
    """Units of this stage (optimiser steps, examples, rounds) done, of `total`."""
    total: int = 0
    detail: str = ""
    final: bool = False
    """The cell or the stage has ended: worth a line of its own."""


@dataclass(frozen=True)
class RunResult:
    """What a run came to."""

    folder: Path
    verdicts: dict[str, Verdict]
    """One per candidate."""
    report: Path


@dataclass(frozen=True)
class Plan:
    """One arm as it will be trained: with the rank that meets the baseline's budget."""

    arm: ArmConfig
    adapter: AdapterConfig


Show = Callable[[Event], None]


def run(
    config: ExperimentConfig, on_event: Show | None = None, command: str | None = None
) -> RunResult:
    """Everything that `bem run` does.

    Args:
        on_event: called with what is happening.
        command: how the run was started, for the report's "how to repeat it".
    Raises:
        BemError: a problem with config, data, base or training; what is finished is kept.
        KeyboardInterrupt: passed on; the same call resumes.
    """
    show = on_event or (lambda event: None)
    folder = RunFolder(Path(config.output) / config.name)
    with folder.lock():
        work = Work(config, folder, show)
        work.claim(command)
        work.all_cells()
        work.timings()
        show(Event("judging"))
        judgement = judging.judge_run(folder, config, primary_metrics(work.tasks))
        show(Event("writing the report"))
        return RunResult(folder.path, judgement.candidates, report.write(folder.path))


def train(
    config: ExperimentConfig,
    arm: str,
    seed: int,
    on_event: Show | None = None,
    command: str | None = None,
) -> Path:
    """Train and measure one cell in the run's folder; returns its checkpoint."""
    if arm not in {a.name for a in config.arms}:
        raise ConfigError(f"No arm {arm!r}. Arms: {', '.join(a.name for a in config.arms)}.")
    if seed not in config.seeds:
        raise ConfigError(f"Seed {seed} is none of the config's seeds {config.seeds}.")
    folder = RunFolder(Path(config.output) / config.name)
    with folder.lock():
        work = Work(config, folder, on_event or (lambda event: None))
        work.claim(command)
        work.one_cell(next(plan for plan in work.plans if plan.arm.name == arm), seed, 1, 1)
        return folder.cell(arm, seed).checkpoint


def train_router(
    config: ExperimentConfig,
    seed: int,
    stage: str = "ar1",
    on_event: Show | None = None,
    command: str | None = None,
) -> Path:
    """Make the experts and the routers of one seed in the run's folder; `run` takes them over.

    Args:
        stage: `ar0`: up to the cloned router; `ar1`: up to the one improved by policy gradient.
    Returns:
        Folder of that router, for `bem.load_router`.
    Raises:
        ConfigError: no `routing` section, no such stage, or none of the config's seeds.
    """
    if config.routing is None:
        raise ConfigError("The config has no `routing` section, so there is no router to train.")
    if stage not in ("ar0", "ar1"):
        raise ConfigError(f"No stage {stage!r}. Stages: ar0, ar1.")
    if seed not in config.seeds:
        raise ConfigError(f"Seed {seed} is none of the config's seeds {config.seeds}.")
    folder = RunFolder(Path(config.output) / config.name)
    with folder.lock():
        work = Work(config, folder, on_event or (lambda event: None))
        work.claim(command)
        stages = work.stages(seed)
        return stages.ar0() if stage == "ar0" else stages.ar1()


def evaluate(
    config: ExperimentConfig, checkpoint: Path, on_event: Show | None = None
) -> Measurement:
    """Measure one checkpoint on the held-out rows of the config's tasks."""
    show = on_event or (lambda event: None)
    show(Event("loading the base"))
    model, tokenizer = load_base(config.base, device_of(config))
    tasks = [
        with_evidence(task, None, _finding(task, show))
        for task in load_tasks(config.data, need_train=False)
    ]
    attached = load_router(model, checkpoint) if is_router(checkpoint) else load(model, checkpoint)
    return measure(
        attached,
        tokenizer,
        tasks,
        name=checkpoint.name,
        batch_size=config.eval_batch_size,
        max_length=config.training.max_length,
        on_progress=lambda done, total: show(Event("measuring", done=done, total=total)),
    )


def primary_metrics(tasks: list[Task]) -> list[str]:
    """The family that is declared before looking: overall quality, then the tasks' own metrics.

    Quality is each row's own primary metric; if all rows share one, it is that one.
    """
    primary = list(dict.fromkeys(t.primary for t in tasks if METRICS[t.primary].core))
    alike = len(primary) == 1 and all(t.primary == primary[0] for t in tasks)
    return primary if alike else [QUALITY, *primary]


def device_of(config: ExperimentConfig) -> str:
    """The device that a config means here; `auto` is the first GPU, else the CPU."""
    gpus = torch.cuda.device_count()
    if config.device == "auto":
        return "cuda" if gpus else "cpu"
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if config.device not in known:
        raise ConfigError(f"No device {config.device!r} here. There is: {', '.join(known)}.")
    return config.device


def plan_arms(model: Any, config: ExperimentConfig) -> list[Plan]:
    """Every arm with its rank chosen to cost what the baseline costs, in what it is matched on."""
    plans = []
    for arm in config.arms:
        adapter = config.adapter_of(arm)
        if arm.role != "baseline" and arm.match != "none" and not arm.route:
            if config.baseline.route:
                raise ConfigError(
                    f"Arm {arm.name}: its rank cannot be matched to {config.baseline.name}, which has a route. "
                    "Set `match: none` and its rank."
                )
            target = price(model, config.adapter_of(config.baseline))
            tolerance = config.gates.budget_tolerance
            adapter = match_rank(model, adapter, target, on=arm.match, tolerance=tolerance)
        plans.append(Plan(arm, adapter))
    return plans


class Work:
    """One run at work: the base, the rows and the plans are loaded once, cells are done one by one."""

    def __init__(self, config: ExperimentConfig, folder: RunFolder, show: Show):
        self.config, self.folder, self.show = config, folder, show
        show(Event("reading the data"))
        self.tasks = [
            with_evidence(task, folder.evidence, _finding(task, show))
            for task in load_tasks(config.data)
        ]
        self.examples = training_mixture(self.tasks)
        self.device = device_of(config)
        if config.threads:
            torch.set_num_threads(config.threads)
        show(Event("loading the base"))
        self.model, self.tokenizer = load_base(config.base, self.device)
        self.plans = plan_arms(self.model, config)
        self.data = {
            "train": data_hash(self.examples),
            **{f"{task.name} dev": data_hash(task.dev) for task in self.tasks},
        }
        self.base = base_hash(self.model)
        self.started = time.monotonic()
        self.worked = 0
        """Cells that were not found finished."""
        self._event = Event("")
        self._stages: dict[int, Stages] = {}

    def claim(self, command: str | None) -> None:
        """Take the run's folder, and record what the run depends on."""
        self.folder.claim(
            self.config,
            {
                **environment.describe(),
                "device": self.device,
                "threads": torch.get_num_threads(),
                "workers": self.config.workers,
                "seeds": self.config.seeds,
                "data": self.data,
                "base": self.base,
                "command": command,
            },
        )
        facts = {task.name: task.facts for task in self.tasks if task.facts}
        if facts:
            write_json(self.folder.path / "evidence.json", facts)

    def all_cells(self) -> None:
        """Seed by seed, so that every arm has its first numbers early."""
        cells = [(plan, seed) for seed in self.config.seeds for plan in self.plans]
        # What makes the most stages comes first: the other routes then find them made.
        cells.sort(key=lambda cell: {"ar1": 0, None: 1}.get(cell[0].arm.route, 2))
        workers = min(self.config.workers, len(cells))
        if workers > 1 and not all(self._is_finished(plan, seed) for plan, seed in cells):
            named = [(p.arm.name, s, n, len(cells)) for n, (p, s) in enumerate(cells, 1)]
            run_apart(self.config, named, workers, self.show)
            return
        for number, (plan, seed) in enumerate(cells, 1):
            self.one_cell(plan, seed, number, len(cells))

    def one_cell(self, plan: Plan, seed: int, number: int, of: int) -> None:
        """Train, save and measure one arm with one seed, unless that was done before."""
        cell = self.folder.cell(plan.arm.name, seed)
        adapter = plan.adapter.model_copy(update={"seed": plan.adapter.seed + seed})
        key = self._key(adapter, seed, plan.arm.route)
        event = Event("", plan.arm.name, seed, number, of)
        if self._is_finished(plan, seed):
            self.show(_now(event, "finished before: skipped", final=True))
            return
        if plan.arm.route:
            quality = self._routed_cell(plan.arm, seed, cell, event)
            self._finished(cell, key, event, f"quality {quality:.1%}")
            return
        attached = attach(self.model, adapter)
        try:
            result = fit(
                attached,
                self.tokenizer,
                self.examples,
                self.config.training,
                cell.path,
                seed,
                on_progress=lambda step: self.show(self._step(event, step)),
                label=f"{plan.arm.name} seed {seed}",
            )
            attached.save(cell.checkpoint, data_hash=result.data_hash, extra={"seed": seed})
            measurement = self._measure(attached, self.tasks, cell, event)
        finally:
            self.model = attached.detach()
        quality = float(measurement.metrics[QUALITY].mean())  # type: ignore[union-attr]
        done = f"loss {result.final_loss:.3f}, quality {quality:.1%}"
        self._finished(cell, key, event, done)

    def _finished(self, cell: Cell, key: str, event: Event, detail: str) -> None:
        cell.finish(key)
        (cell.path / STATE).unlink(missing_ok=True)  # only needed to resume the training
        self.worked += 1
        detail += self._left(event.cells - event.cell)
        self.show(_now(event, "done", detail=detail, final=True))

    def _routed_cell(self, arm: ArmConfig, seed: int, cell: Cell, event: Event) -> float:
        """Make and measure an arm with a route; returns its mean quality."""
        self._event = event
        with opened(arm, self.stages(seed), cell) as ready:
            ready.attached.save(cell.checkpoint, self.data["train"])
            plans = ready.facts.get("conversations", {}).get("plans")
            facts = None if plans is None else RouterFacts(plan_lengths=plans)
            measurement = self._measure(ready.attached, ready.tasks, cell, event, facts)
            keep_facts(cell, ready.facts)
        return float(measurement.metrics[QUALITY].mean())  # type: ignore[union-attr]

    def stages(self, seed: int) -> Stages:
        """Experts and routers of one seed."""
        if seed not in self._stages:
            self._stages[seed] = Stages(
                self.config,
                self.folder.path,
                self.model,
                self.tokenizer,
                self.tasks,
                self.examples,
                seed,
                lambda stage, done, of, detail: self.show(
                    _now(self._event, stage, done=done, total=of, detail=detail)
                ),
            )
        return self._stages[seed]

    def _is_finished(self, plan: Plan, seed: int) -> bool:
        adapter = plan.adapter.model_copy(update={"seed": plan.adapter.seed + seed})
        key = self._key(adapter, seed, plan.arm.route)
        return self.folder.cell(plan.arm.name, seed).is_finished(key)

    def timings(self) -> None:
        """Latency and memory of all arms with the first seed's adapters, unless that was done."""
        seed = self.config.seeds[0]
        cells = {plan.arm.name: self.folder.cell(plan.arm.name, seed) for plan in self.plans}
        adapters = {name: file_hash(cell.checkpoint / MANIFEST) for name, cell in cells.items()}
        key = digest_of({"adapters": adapters, "rounds": self.config.latency_rounds})
        if self.folder.latency.is_file() and read_json(self.folder.latency)["key"] == key:
            return
        self.show(Event("timing"))
        arms = {
            plan.arm.name: self._reopened(plan.arm, cells[plan.arm.name], seed)
            for plan in self.plans
        }
        rounds = self.config.latency_rounds
        timings = measure_latency(
            arms,
            rounds=rounds,
            prompt_tokens=min(PROMPT_TOKENS, context_length(self.model) - NEW_TOKENS),
            new_tokens=NEW_TOKENS,
            on_progress=lambda done, of: self.show(Event("timing", done=done, total=of)),
        )
        memory = {name: peak_memory(arm) for name, arm in arms.items()}
        write_json(self.folder.latency, {"key": key, **asdict(timings), "memory_bytes": memory})
        detail = f"{rounds} rounds of all arms, interleaved"
        self.show(Event("timing", detail=detail, final=True))

    def _reopened(self, arm: ArmConfig, cell: Cell, seed: int) -> Any:
        """A cell's adapter on a copy of the base that shares its weights."""
        model = with_shared_weights(self.model)
        if arm.route:
            return reopened(model, arm, cell, self.stages(seed))
        return load(model, cell.checkpoint)

    def _measure(
        self,
        attached: Any,
        tasks: list[Task],
        cell: Cell,
        event: Event,
        router: RouterFacts | None = None,
    ) -> Measurement:
        """Measure and save; `router` is what is known of a router's plans."""
        measurement = measure(
            attached,
            self.tokenizer,
            tasks,
            name=event.arm,
            batch_size=self.config.eval_batch_size,
            max_length=self.config.training.max_length,
            predictions=cell.predictions,
            on_progress=lambda done, total: self.show(
                _now(event, "measuring", done=done, total=total)
            ),
        )
        if router is not None:
            measurement = replace(measurement, router=router)
        save(measurement, cell.measurement)
        return measurement

    def _key(self, adapter: AdapterConfig, seed: int, route: str | None) -> str:
        """Everything that a cell's result depends on."""
        routing = self.config.routing
        by_route = (
            {} if not route or not routing else {"route": [route, routing.model_dump(mode="json")]}
        )
        return digest_of(
            {
                "bem": bem.__version__,
                "adapter": adapter.model_dump(mode="json"),
                "training": self.config.training.model_dump(mode="json"),
                "seed": seed,
                "data": self.data,
                "answers": {t.name: [t.max_new_tokens, t.metrics, t.form] for t in self.tasks},
                "base": self.base,
                **by_route,
            }
        )

    def _step(self, event: Event, step: StepMetrics) -> Event:
        rate = step.tokens / max(step.seconds, 1e-9)
        detail = f"loss {step.loss:.3f}, {rate:,.0f} tokens/s"
        return _now(
            event, "training", done=step.step, total=self.config.training.steps, detail=detail
        )

    def _left(self, cells: int) -> str:
        if not cells:
            return ""
        seconds = (time.monotonic() - self.started) / self.worked * cells / self.config.workers
        return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"


def _finding(task: Task, show: Show) -> Callable[[int, int], None]:
    """Passes on how far the search for a task's evidence is."""

    def tell(done: int, total: int) -> None:
        if done % 16 == 0 or done == total:
            event = Event("finding evidence", done=done, total=total, detail=task.name)
            show(replace(event, final=done == total))

    return tell


def _now(event: Event, stage: str, **values: Any) -> Event:
    return Event(**{**vars(event), "stage": stage, **values})
