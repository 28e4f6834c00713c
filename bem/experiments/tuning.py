"""The learning rate of an arm, found by successive halving on rows that are set aside.

Every trial is the beginning of the arm's own training (same rows in the same order, schedule of the whole
length) at another peak rate. After each rung the half with the lower validation loss goes on, so all arms
get the same budget, and the winner's steps are not lost: its training goes on from where the trial ended.

    runs/NAME/tuning/ARM.json      what was tried and chosen, for the report
    runs/NAME/tuning/ARM/          states of the trials, until one is chosen
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bem
from bem.config import TrainingConfig, TuningConfig
from bem.errors import CheckpointError, Diverged, TrainingError
from bem.experiments.inputs import RunInputs
from bem.files import locked, read_json, sha256_json, write_json
from bem.training.state import METRICS, STATE

Train = Callable[[TrainingConfig, Path, int], float]
"""(how, folder of the training's state, last step) -> loss on the validation rows."""
Say = Callable[[str, int, int], None]
"""(what is tried, trial, of)"""


@dataclass
class Search:
    """Successive halving of one arm, kept on disk after every trial."""

    name: str
    folder: Path
    """`tuning` of the run."""
    tuning: TuningConfig
    training: TrainingConfig
    depends_on: Mapping[str, Any]
    """Everything else that a trial's loss depends on."""

    @property
    def record(self) -> Path:
        return self.folder / f"{self.name}.json"

    def state_of(self, rate: float) -> Path:
        """Folder of a trial."""
        return self.folder / self.name / f"{rate:g}"

    def tuned(self, train: Train, say: Say) -> TrainingConfig:
        """The training at the rate that won; searched for unless that was done.

        Another process that needs the same waits. Raises TrainingError: every trial diverged.
        """
        with locked(self.folder / f".{self.name}.lock", wait=lambda: say("waiting", 0, 0)):
            done = self._read()
            if "chosen" not in done:
                self._halve(done, train, say)
            return self._at(float(done["chosen"]))

    def hand_over(self, rate: float, folder: Path) -> None:
        """Give the winner's state to the training that goes on from it, and delete the others."""
        with locked(self.folder / f".{self.name}.lock"):
            won = self.state_of(rate)
            if (won / STATE).is_file() and not (folder / STATE).exists():
                folder.mkdir(parents=True, exist_ok=True)
                for name in (
                    METRICS,
                    STATE,
                ):  # a kill in between leaves the state, which is moved again
                    if (won / name).exists():
                        (won / name).replace(folder / name)
            shutil.rmtree(self.folder / self.name, ignore_errors=True)

    def _at(self, rate: float) -> TrainingConfig:
        return self.training.model_copy(update={"learning_rate": rate})

    def _read(self) -> dict[str, Any]:
        key = sha256_json(
            {
                "tuning": self.tuning.model_dump(mode="json"),
                "training": self.training.model_dump(mode="json"),
                **self.depends_on,
            }
        )
        done = read_json(self.record, CheckpointError) if self.record.is_file() else {}
        if done.get("key") == key:
            return done
        shutil.rmtree(self.folder / self.name, ignore_errors=True)
        return {"key": key, "trials": []}

    def _halve(self, done: dict[str, Any], train: Train, say: Say) -> None:
        """Fill `done` with trials and, at the end, with what is chosen."""
        rates: Sequence[float] = self.tuning.rates
        total, tried = _number_of_trials(self.tuning), 0
        for steps in self.tuning.rungs:
            losses = {}
            for rate in rates:
                tried += 1
                say(f"rate {rate:g} for {steps} steps", tried, total)
                losses[rate] = self._trial(done, rate, steps, train)
            ranked = sorted(rates, key=losses.__getitem__)
            rates = sorted(ranked[: -(-len(rates) // 2)])
        if not math.isfinite(losses[ranked[0]]):
            raise TrainingError(
                f"{self.name}: the training diverged at every rate of tuning.rates "
                f"{list(self.tuning.rates)}. Try lower ones."
            )
        done["chosen"] = ranked[0]
        write_json(self.record, done)

    def _trial(self, done: dict[str, Any], rate: float, steps: int, train: Train) -> float:
        """Loss after so many steps at a rate, inf if it diverged; from the record if it is there."""
        for trial in done["trials"]:
            if (trial["rate"], trial["steps"]) == (rate, steps):
                return math.inf if trial["loss"] is None else trial["loss"]
        try:
            loss = train(self._at(rate), self.state_of(rate), steps)
        except Diverged:
            loss = math.inf
        loss = loss if math.isfinite(loss) else math.inf
        kept = None if math.isinf(loss) else loss
        done["trials"].append({"rate": rate, "steps": steps, "loss": kept})
        write_json(self.record, done)
        return loss


def trial_facts(inputs: RunInputs, seed: int) -> dict[str, Any]:
    """What every trial depends on, whatever is trained. Held-out rows are not among it."""
    data = {part: inputs.data[part] for part in ("train", "validation")}
    return {"bem": bem.__version__, "seed": seed, "data": data, "base": inputs.base}


def _number_of_trials(tuning: TuningConfig) -> int:
    """Of all rungs: five rates make 5 + 3 + 2."""
    total, count = 0, len(tuning.rates)
    for _ in tuning.rungs:
        total, count = total + count, -(-count // 2)
    return total
