"""Run an experiment: train every arm over seeds, measure, judge, report; skip what is done.

config -> rows and base (inputs) -> plans (equal budgets) -> cells (arm x seed) -> timings -> verdicts -> report
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bem.adapters.attach import load
from bem.adapters.copies import with_shared_weights
from bem.bases.load import load_base
from bem.config import ArmConfig, ExperimentConfig
from bem.errors import CheckpointError, ConfigError
from bem.evidence.encoders import load_encoder
from bem.experiments.bare import few_shot, load_bare
from bem.experiments.cell import CellRunner
from bem.experiments.events import Event, Show, ignore
from bem.experiments.inputs import RunInputs, device_of, load_inputs, tell_search
from bem.experiments.measuring.answers import context_length, measure
from bem.experiments.measuring.latency import Budget, Pair, measure_latency
from bem.experiments.measuring.memory import added_memory, whole_memory
from bem.experiments.plan import Plan, plan_arms, primary_metrics
from bem.experiments.routing.arms import reopened
from bem.experiments.workers import run_apart
from bem.files import made_under, sha256_file, sha256_json, write_json
from bem.report import page
from bem.routing.mount import load_router
from bem.runs import machine
from bem.runs.folder import RunFolder, checkpoint_kind, written
from bem.runs.verdicts import judge_run, opponent_of
from bem.stats.latency import further_rounds
from bem.stats.measurement import Measurement
from bem.stats.verdict import Verdict
from bem.tasks.load import load_tasks
from bem.tasks.retrieval import with_evidence

PROMPT_TOKENS, NEW_TOKENS = 256, 32
"""What is timed: a prefill, and decoding token by token."""
TIMINGS_FORMAT = 3
"""Of latency.json: since 2 its memory is what an adapter adds, without the base's weights; since 3 arms with a fixed
route are timed under an expert."""


@dataclass(frozen=True)
class RunResult:
    """Result of a run."""

    folder: Path
    verdicts: dict[str, Verdict]
    """One per candidate."""
    report: Path


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
    show = on_event or ignore
    folder = RunFolder(Path(config.output) / config.name)
    with folder.lock():
        work = ExperimentRun(load_inputs(config, folder, show), show)
        work.claim(command)
        work.try_early()
        work.all_cells()
        work.timings()
        show(Event("judging"))
        judgement = judge_run(folder, config, primary_metrics(work.inputs.tasks))
        show(Event("writing the report"))
        return RunResult(folder.path, judgement.candidates, page.write(folder.path))


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
    _check_seed(config, seed)

    def one(work: ExperimentRun) -> Path:
        work.cells.one_cell(work.plan_of(arm), seed, 1, 1)
        return work.inputs.folder.cell(arm, seed).checkpoint

    return _in_folder(config, on_event, command, one)


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
    _check_seed(config, seed)
    if config.routing.checkpoint is not None:
        raise ConfigError(
            f"routing.checkpoint {config.routing.checkpoint} is a router that was saved, so there is none to train. "
            "Remove it to train one."
        )

    def up_to(work: ExperimentRun) -> Path:
        routing = work.cells.routing(seed)
        return routing.ar0() if stage == "ar0" else routing.ar1()

    return _in_folder(config, on_event, command, up_to)


def evaluate(
    config: ExperimentConfig, checkpoint: Path, on_event: Show | None = None
) -> Measurement:
    """Measure one checkpoint on the held-out rows of the config's tasks."""
    if (kind := checkpoint_kind(checkpoint)) == "bare":
        raise CheckpointError(
            f"{checkpoint} holds no adapter: its arm was the bare base, which `bem run` measures."
        )
    show = on_event or ignore
    show(Event("loading the base"))
    model, tokenizer = load_base(config.base, device_of(config), config.dtype)
    tasks = [
        with_evidence(task, None, tell_search(task, show))
        for task in load_tasks(config.data, need_train=False)
    ]
    attached = (load_router if kind == "router" else load)(model, checkpoint)
    return measure(
        attached,
        tokenizer,
        tasks,
        name=checkpoint.name,
        batch_size=config.eval_batch_size,
        max_length=config.training.max_length,
        on_progress=lambda done, total: show(Event("measuring", done=done, total=total)),
    )


def _check_seed(config: ExperimentConfig, seed: int) -> None:
    if seed not in config.seeds:
        raise ConfigError(f"Seed {seed} is none of the config's seeds {config.seeds}.")


def _in_folder(
    config: ExperimentConfig,
    on_event: Show | None,
    command: str | None,
    work: Callable[[ExperimentRun], Path],
) -> Path:
    """Do a part of a run, with its folder locked and claimed."""
    show = on_event or ignore
    folder = RunFolder(Path(config.output) / config.name)
    with folder.lock():
        run = ExperimentRun(load_inputs(config, folder, show), show)
        run.claim(command)
        return work(run)


class ExperimentRun:
    """One run at work on inputs that are loaded once."""

    def __init__(self, inputs: RunInputs, show: Show):
        self.inputs, self.show = inputs, show
        self.cells = CellRunner(inputs, show)
        self.plans = plan_arms(inputs.model, inputs.config)

    def plan_of(self, arm: str) -> Plan:
        return next(plan for plan in self.plans if plan.arm.name == arm)

    def claim(self, command: str | None) -> None:
        """Take the run's folder, record what the run depends on, and say what each arm will be."""
        inputs, folder = self.inputs, self.inputs.folder
        folder.claim(
            inputs.config,
            {
                **machine.describe(),
                "device": inputs.device,
                "threads": torch.get_num_threads(),
                "workers": inputs.config.workers,
                "seeds": inputs.config.seeds,
                "data": inputs.data,
                "base": inputs.base,
                "command": command,
            },
        )
        write_json(folder.plans, {plan.arm.name: plan.record() for plan in self.plans})
        for plan in self.plans:
            self.show(Event(f"arm {plan.arm.name}", detail=plan.summary(), final=True))
        if facts := {task.name: task.facts for task in inputs.tasks if task.facts}:
            write_json(folder.path / "evidence.json", facts)

    def try_early(self) -> None:
        """What would end a long run late ends it here: an encoder that is not there, examples that do
        not fit the base's context, a saved adapter of another base."""
        inputs, config = self.inputs, self.inputs.config
        for arm in config.arms:
            if (saved := arm.checkpoint) is not None:
                load(with_shared_weights(inputs.model), saved)
        if config.routing and any(arm.route == "encoder" for arm in config.arms):
            load_encoder(config.routing.encoder, inputs.device)
        for arm in config.arms:
            for seed in config.seeds if arm.shots else ():
                few_shot(inputs, arm.shots or 0, seed)

    def all_cells(self) -> None:
        """Seed by seed, so that every arm has its first numbers early."""
        config = self.inputs.config
        cells = [(plan, seed) for seed in config.seeds for plan in self.plans]
        # What makes the most stages comes first: the other routes then find them made. The bare base, which
        # rarely ends an answer by itself, takes longest and helps nobody.
        order = {"ar1": 0, None: 1}
        cells.sort(key=lambda cell: 3 if cell[0].arm.is_bare else order.get(cell[0].arm.route, 2))
        workers = min(config.workers, len(cells))
        if workers > 1 and not all(self.cells.is_finished(*cell) for cell in cells):
            named = [(p.arm.name, s, n, len(cells)) for n, (p, s) in enumerate(cells, 1)]
            run_apart(config, named, workers, self.show)
            return
        for number, (plan, seed) in enumerate(cells, 1):
            self.cells.one_cell(plan, seed, number, len(cells))

    def timings(self) -> None:
        """Latency and memory of all arms with the first seed's adapters, unless that was done."""
        config, latency = self.inputs.config, self.inputs.folder.latency
        key = self._timings_key()
        if made_under(latency, key):
            return
        self.show(Event("measuring memory"))
        arms = {plan.arm.name: self._reopened(plan.arm) for plan in self.plans}
        prompt = min(PROMPT_TOKENS, context_length(self.inputs.model) - NEW_TOKENS)
        memory = added_memory(arms, self.inputs.model, prompt_tokens=prompt)
        base = whole_memory(self.inputs.model, prompt_tokens=prompt)
        self.show(Event("timing"))
        pairs = [(a.name, opponent_of(config, a)) for a in config.arms if a.role == "candidate"]
        judged = "latency" not in config.gates.waived
        timings = measure_latency(
            arms,
            rounds=config.latency_rounds,
            prompt_tokens=prompt,
            new_tokens=NEW_TOKENS,
            pairs=pairs if judged else (),
            undecided=self._further_rounds,
            budget=Budget(config.most_latency_rounds, config.latency_seconds_max),
            on_progress=lambda done, of: self.show(Event("timing", done=done, total=of)),
        )
        facts = {"adapter_memory_bytes": memory, "base_memory_bytes": base}
        write_json(latency, {"key": key, **asdict(timings), **facts})
        detail = f"{timings.rounds} rounds of all arms, interleaved"
        self.show(Event("timing", detail=detail, final=True))

    def _further_rounds(self, pairs: Sequence[Pair]) -> int:
        """Rounds that are still worth timing for the latency gate of some candidate."""
        gates, budget = self.inputs.config.gates, self.inputs.config.most_latency_rounds
        return max(
            further_rounds(*pair, gates.latency_ratio_max, budget, gates.alpha, gates.power)
            for pair in pairs
        )

    def _timings_key(self) -> str:
        """sha256 of everything that the timings depend on."""
        config, folder = self.inputs.config, self.inputs.folder
        checkpoints = {
            plan.arm.name: folder.cell(plan.arm.name, config.seeds[0]).checkpoint
            for plan in self.plans
        }
        facts: dict[str, Any] = {
            "format": TIMINGS_FORMAT,
            "adapters": {
                n: sha256_file(written(c / "manifest.json")) for n, c in checkpoints.items()
            },
            "rounds": [config.latency_rounds, config.most_latency_rounds],
        }
        return sha256_json(facts)

    def _reopened(self, arm: ArmConfig) -> Any:
        """What the first seed of an arm saved, on a copy of the base that shares its weights."""
        seed = self.inputs.config.seeds[0]
        cell = self.inputs.folder.cell(arm.name, seed)
        model = with_shared_weights(self.inputs.model)
        if arm.is_bare:
            return load_bare(model, cell.checkpoint)
        if arm.route:
            return reopened(model, arm, cell, self.cells.routing(seed))
        return load(model, cell.checkpoint)
