"""One cell of a run: one arm with one seed, trained, measured and saved, unless that was done before."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bem
from bem.adapters.attach import load
from bem.config import AdapterConfig, TrainingConfig
from bem.experiments.adapted import adapted, put_on
from bem.experiments.bare import Bare, few_shot
from bem.experiments.events import Event, Show
from bem.experiments.inputs import RunInputs, encoded_rows
from bem.experiments.measuring.answers import measure
from bem.experiments.measuring.kept import KeptAnswers
from bem.experiments.plan import Plan
from bem.experiments.routing.arms import ready_arm
from bem.experiments.routing.stages import RoutingArtifacts
from bem.experiments.tuning import Search, trial_facts
from bem.files import sha256_file, sha256_json, write_json
from bem.releases.named import router_of, static_of
from bem.runs.folder import Cell
from bem.stats.files import save
from bem.stats.measurement import Measurement, RouterFacts
from bem.tasks.load import Task
from bem.tasks.scoring import QUALITY
from bem.training.early_stopping import validation_loss
from bem.training.fit import STATE, FitResult, fit
from bem.training.trainer import StepResult


class CellRunner:
    """Works through cells one after another on one base; a process has one of these."""

    def __init__(self, inputs: RunInputs, show: Show):
        self.inputs, self.show = inputs, show
        self._started = time.monotonic()
        self._worked = 0
        """Cells that were not finished before."""
        self._event = Event("")
        self._artifacts: dict[int, RoutingArtifacts] = {}

    def is_finished(self, plan: Plan, seed: int) -> bool:
        """The cell was made before, from the same inputs."""
        cell = self.inputs.folder.cell(plan.arm.name, seed)
        return cell.is_finished(cell_key(self.inputs, plan, seed))

    def one_cell(self, plan: Plan, seed: int, number: int, of: int) -> None:
        """Train, save and measure one arm with one seed, unless that was done before.

        Args:
            number, of: which cell this is, from 1, of how many: for whoever watches.
        """
        event = self._event = Event("", plan.arm.name, seed, number, of)
        if self.is_finished(plan, seed):
            self.show(event.at("finished before: skipped", final=True))
            return
        cell = self.inputs.folder.cell(plan.arm.name, seed)
        make = self._routed_cell if plan.arm.route else self._trained_cell
        if plan.arm.is_bare:
            make = self._bare_cell
        elif plan.arm.checkpoint is not None:
            make = self._saved_cell
        detail = make(plan, seed, cell, event)
        cell.finish(cell_key(self.inputs, plan, seed))
        (cell.path / STATE).unlink(missing_ok=True)  # only needed to resume the training
        self._worked += 1
        self.show(event.at("done", detail=detail + self._left(of - number), final=True))

    def routing(self, seed: int) -> RoutingArtifacts:
        """Experts and routers of one seed."""
        if seed not in self._artifacts:
            self._artifacts[seed] = RoutingArtifacts(self.inputs, seed, self._tell)
        return self._artifacts[seed]

    def _trained_cell(self, plan: Plan, seed: int, cell: Cell, event: Event) -> str:
        """Train, save and measure an arm without a route; returns what to say of it."""
        training = self._training_of(plan, seed, cell)
        with adapted(self.inputs.model, seeded(plan, seed)) as attached:
            result = self._fit(attached, plan, seed, training, cell.path)
            extra = {
                "seed": seed,
                "learning_rate": training.learning_rate,
                "step": result.kept_step,
            }
            attached.save(cell.checkpoint, data_hash=result.data_hash, extra=extra)
            measurement = self._measure(attached, self.inputs.tasks, cell, event)
        save(measurement, cell.measurement)
        return f"loss {result.final_loss:.3f}, quality {_mean_quality(measurement):.1%}"

    def _training_of(self, plan: Plan, seed: int, cell: Cell) -> TrainingConfig:
        """How an arm is fitted: at the rate that the search on the first seed chose, if there is a search."""
        config = self.inputs.config
        training, first = config.training_of(plan.arm), config.seeds[0]
        if config.tuning is None:
            return training
        facts = trial_facts(self.inputs, first) | {"adapter": seeded(plan, first).model_dump()}
        folder = self.inputs.folder.tuning
        search = Search(plan.arm.name, folder, config.tuning, training, facts)
        tuned = search.tuned(lambda *trial: self._trial(plan, first, *trial), self._tell_trial)
        if seed == first:
            search.hand_over(tuned.learning_rate, cell.path)
        return tuned

    def _trial(
        self, plan: Plan, seed: int, training: TrainingConfig, folder: Path, until: int
    ) -> float:
        """Train the beginning of an arm; its loss on the validation rows."""
        rows = encoded_rows(self.inputs, self.inputs.validation)
        with adapted(self.inputs.model, seeded(plan, seed)) as attached:
            self._fit(attached, plan, seed, training, folder, until)
            return validation_loss(attached, self.inputs.tokenizer, rows)

    def _fit(
        self,
        attached: Any,
        plan: Plan,
        seed: int,
        training: TrainingConfig,
        folder: Path,
        until: int | None = None,
    ) -> FitResult:
        inputs, event = self.inputs, self._event
        return fit(
            attached,
            inputs.tokenizer,
            inputs.examples,
            training,
            folder,
            seed,
            on_progress=lambda step: self.show(_step(event, step, until or training.steps)),
            label=f"{plan.arm.name} seed {seed}",
            validation=inputs.validation,
            until=until,
        )

    def _tell_trial(self, what: str, trial: int, of: int) -> None:
        self.show(self._event.at("tuning", done=trial, total=of, detail=what))

    def _routed_cell(self, plan: Plan, seed: int, cell: Cell, event: Event) -> str:
        """Make and measure an arm with a route; returns what to say of it."""
        with ready_arm(plan.arm, self.routing(seed), cell) as ready:
            ready.attached.save(cell.checkpoint, self.inputs.data["train"])
            measurement = self._measure(ready.attached, ready.tasks, cell, event, kept=ready.kept)
        if "conversations" in ready.facts:
            measurement = with_plans(measurement, ready.facts["conversations"]["plans"])
        save(measurement, cell.measurement)
        write_json(cell.route, ready.facts)
        return f"quality {_mean_quality(measurement):.1%}{_taken_over(measurement)}"

    def _saved_cell(self, plan: Plan, seed: int, cell: Cell, event: Event) -> str:
        """Measure what a checkpoint holds; returns what to say of it."""
        saved = plan.arm.checkpoint
        assert saved is not None
        with put_on(self.inputs.model, lambda base: load(base, saved)) as attached:
            attached.save(cell.checkpoint, extra={"checkpoint": saved})
            measurement = self._measure(attached, self.inputs.tasks, cell, event)
        save(measurement, cell.measurement)
        return f"quality {_mean_quality(measurement):.1%}"

    def _bare_cell(self, plan: Plan, seed: int, cell: Cell, event: Event) -> str:
        """Measure the base itself; returns what to say of it."""
        inputs, shots = self.inputs, plan.arm.shots
        assert shots is not None
        tasks, max_length = few_shot(inputs, shots, seed)
        kept = KeptAnswers(inputs.folder.path / "base-answers", inputs.base, inputs.model)
        with put_on(inputs.model, Bare) as bare:
            bare.save(cell.checkpoint, shots, inputs.data["train"])
            measurement = self._measure(bare, tasks, cell, event, max_length, kept)
        save(measurement, cell.measurement)
        return f"quality {_mean_quality(measurement):.1%}{_taken_over(measurement)}"

    def _measure(
        self,
        attached: Any,
        tasks: Sequence[Task],
        cell: Cell,
        event: Event,
        max_length: int | None = None,
        kept: KeptAnswers | None = None,
    ) -> Measurement:
        config = self.inputs.config
        return measure(
            attached,
            self.inputs.tokenizer,
            tasks,
            name=event.arm,
            batch_size=config.eval_batch_size,
            max_length=max_length or config.training.max_length,
            predictions=cell.predictions,
            kept=kept,
            on_progress=lambda done, total: self.show(
                event.at("measuring", done=done, total=total)
            ),
        )

    def _tell(self, stage: str, done: int, total: int, detail: str) -> None:
        self.show(self._event.at(stage, done=done, total=total, detail=detail))

    def _left(self, cells: int) -> str:
        if not cells:
            return ""
        spent = time.monotonic() - self._started
        seconds = spent / self._worked * cells / self.inputs.config.workers
        return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"


def cell_key(inputs: RunInputs, plan: Plan, seed: int) -> str:
    """sha256 of everything that a cell's result depends on."""
    config = inputs.config
    facts: dict[str, Any] = {
        "bem": bem.__version__,
        "training": config.training_of(plan.arm).model_dump(mode="json"),
        **({"tuning": config.tuning.model_dump(mode="json")} if config.tuning else {}),
        "seed": seed,
        "data": inputs.data,
        "answers": {t.name: [t.max_new_tokens, t.metrics, t.form] for t in inputs.tasks},
        "base": inputs.base,
    }
    if plan.arm.is_bare:
        facts.pop("tuning", None)
        facts["shots"] = plan.arm.shots
        facts["training"] = {"max_length": config.training.max_length}
    elif plan.arm.checkpoint is not None:
        facts["training"] = {"max_length": config.training.max_length}
        facts["checkpoint"] = sha256_file(static_of(plan.arm.checkpoint) / "manifest.json")
    elif plan.adapter is not None:
        facts["adapter"] = seeded(plan, seed).model_dump(mode="json")
    elif config.routing is not None:
        facts["training"] = config.expert_training.model_dump(mode="json")
        facts["route"] = [plan.arm.route, config.routing.model_dump(mode="json")]
        if config.routing.checkpoint is not None:
            path = router_of(config.routing.checkpoint) / "manifest.json"
            facts["checkpoint"] = sha256_file(path)
    return sha256_json(facts)


def seeded(plan: Plan, seed: int) -> AdapterConfig:
    """The adapter of one seed: its initial weights differ."""
    assert plan.adapter is not None, "an arm with a route has no adapter of its own"
    return plan.adapter.model_copy(update={"seed": plan.adapter.seed + seed})


def with_plans(measurement: Measurement, plans: Sequence[int]) -> Measurement:
    """The measurement with the lengths of the router's plans beside its other router facts.

    Args:
        plans: number of different actions in each turn.
    """
    facts = measurement.router or RouterFacts()
    return replace(measurement, router=replace(facts, plan_lengths=list(plans)))


def _mean_quality(measurement: Measurement) -> float:
    return float(measurement.metrics[QUALITY].mean())  # type: ignore[union-attr]


def _taken_over(measurement: Measurement) -> str:
    rows = measurement.meta.get("taken_over")
    return f", {rows:,} answers taken over" if rows else ""


def _step(event: Event, step: StepResult, steps: int) -> Event:
    rate = step.tokens / max(step.seconds, 1e-9)
    detail = f"loss {step.loss:.3f}, {rate:,.0f} tokens/s"
    return event.at("training", done=step.step, total=steps, detail=detail)
