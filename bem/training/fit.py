"""Fit an adapter on the answers of examples; resumable after a kill with the same bits.

All arms of an experiment see the same examples in the same order, because the order depends only
on the seed and the number of examples. The steps are those of `Trainer`.

A loop of our own rather than transformers' Trainer: that one restores one global random state, which
repeats a run only if the kill fell on a checkpoint, and shuffles inside its sampler.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bem.adapters.version import base_digest
from bem.config import TrainingConfig
from bem.errors import Diverged, TrainingError
from bem.training.data import Encoded, Example, check_fits, data_hash, encode
from bem.training.early_stopping import EarlyStopping
from bem.training.metrics import MetricsLog
from bem.training.state import (
    STATE,
    check_same_run,
    check_same_start,
    disk,
    read_state,
    write_state,
)
from bem.training.trainer import LIKELIHOOD, Objective, StepResult, Trainable, Trainer
from bem.variants.digest import weights_digest


@dataclass(frozen=True)
class FitResult:
    """What a run of `fit` did, over all its resumptions."""

    steps: int
    final_loss: float
    """Mean loss of the last tenth of the steps."""
    losses: list[float] = field(repr=False)
    seconds: float
    cpu_seconds: float
    folder: Path
    tokens: int
    """Tokens seen that were not padding."""
    data_hash: str
    """sha256 of the examples."""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss on the validation rows) of every look at them."""
    best_step: int | None = None
    """Step of the lowest of those losses; None: nothing was validated."""

    @property
    def kept_step(self) -> int:
        """Step whose weights the adapter has."""
        return self.steps if self.best_step is None else self.best_step


def fit(
    attached: Trainable,
    tokenizer: Any,
    examples: Sequence[Example],
    config: TrainingConfig,
    folder: str | Path,
    seed: int,
    on_progress: Callable[[StepResult], None] | None = None,
    label: str | None = None,
    objective: Objective = LIKELIHOOD,
    validation: Sequence[Example] = (),
    until: int | None = None,
) -> FitResult:
    """Train the adapter for `config.steps` steps; the base model stays as it is.

    Args:
        folder: gets state.pt (resumed from when it is there), metrics.jsonl, and TensorBoard files
            if that is installed.
        seed: of the order of the examples and of all noise.
        on_progress: called after every step.
        label: name of the arm in messages; None: the folder's name.
        objective: negative log-likelihood, or what `distill` hands over.
        validation: rows on which `config.patience` decides when to stop; not used without it.
        until: stop after this step of the whole training; another call goes on from there.
    Raises:
        Diverged: the loss or a gradient was not finite.
        TrainingError: nothing to train or to train on, `patience` without validation rows, rows that
            the model cannot take, a folder that holds the state of another run or half of one, or a
            full disk.
        DataError: an answer is longer than `config.max_length`.
        KeyboardInterrupt: passed on; the state is saved, call again to go on.
        Whatever is raised while it trains, the adapter holds the last saved state.
    """
    label = label or Path(folder).name
    if not examples:
        raise TrainingError(f"{label}: no training examples.")
    if config.patience and not validation:
        raise TrainingError(f"{label}: patience {config.patience} needs validation rows, got none.")
    trainer = Trainer(attached, tokenizer, config, seed, objective, label)
    order = example_order(len(examples), config.steps, config.batch_size, seed)
    shown = sorted({i for batch in order for i in batch})
    encoded = {i: encode(examples[i], tokenizer, config.max_length) for i in shown}
    check_fits(attached.model, tokenizer, list(encoded.values()))
    stopper = EarlyStopping(trainer, validation) if config.patience else None
    run = _Run(trainer, Path(folder), _fingerprint(trainer, examples, encoded, validation), stopper)
    run.begin()
    run.go_on([[encoded[i] for i in batch] for batch in order[:until]], on_progress)
    return run.result()


def example_order(n: int, steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """Indices of each step's examples: epoch after epoch, each in a new order."""
    need = steps * batch_size
    epochs = [np.random.default_rng([seed, e]).permutation(n) for e in range(-(-need // n))]
    stream = np.concatenate(epochs)[:need].tolist()
    return [stream[i : i + batch_size] for i in range(0, need, batch_size)]


class _Run:
    """A trainer, and what is saved, restored and counted with it."""

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        fingerprint: dict[str, Any],
        stopper: EarlyStopping | None,
    ):
        self.trainer, self.folder, self.fingerprint = trainer, folder, fingerprint
        self.stopper = stopper
        self.label, self.config = trainer.label, trainer.config
        self.tokens, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.losses: list[float] = []
        self.start = weights_digest(trainer.attached.state_dict())
        self.saved_step = -1
        self.log: MetricsLog | None = None

    def begin(self) -> None:
        """Resume, or write the state before the first step (so a full disk shows at once)."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.label}: cannot use {self.folder}: {error}.") from error
        path = self.folder / STATE
        if path.exists():
            state = self._read()
            stopper = state.get("stopper")
            saved = [state["trainer"]["adapter"], *([stopper["best"]] if stopper else [])]
            now = self.trainer.attached.state_dict()
            check_same_start(path, state["start"], saved, now, self.label)
            self.start = state["start"]
            self._restore(state)
        else:
            self.save()
        with self._disk("the metrics"):
            self.log = MetricsLog(self.folder, self.trainer.steps)

    def go_on(
        self,
        batches: Sequence[Sequence[Encoded]],
        on_progress: Callable[[StepResult], None] | None,
    ) -> None:
        """Take the steps that are left; whatever ends it, the model is in evaluation mode after."""
        model = self.trainer.attached.model.train()
        try:
            self._look()  # an interrupt may have fallen between a step and its look
            while self.trainer.steps < len(batches) and not self._is_over():
                self._step(batches[self.trainer.steps], on_progress)
            if self.saved_step != self.trainer.steps:
                self.save()
            if self.stopper and (self._is_over() or self.trainer.steps == self.config.steps):
                self.stopper.restore_best()
        except KeyboardInterrupt:
            if self.trainer.is_whole and len(self.losses) == self.trainer.steps:
                self.save()
            else:
                self._restore(self._read())
            raise
        except Exception as error:
            self._restore(self._read())
            if isinstance(error, Diverged):
                message = f"{error} Kept the state after step {self.saved_step}."
                raise Diverged(message) from error
            raise
        finally:
            model.eval()
            if self.log is not None:
                self.log.close()

    def _step(
        self, batch: Sequence[Encoded], on_progress: Callable[[StepResult], None] | None
    ) -> None:
        cpu_started = time.process_time()
        result = self.trainer.step(batch)
        self.tokens += result.tokens
        self.seconds += result.seconds
        self.cpu_seconds += time.process_time() - cpu_started
        self.losses.append(result.loss)
        if self.log is not None:
            with self._disk("the metrics"):
                self.log.add(result)
        if on_progress:
            on_progress(result)
        if not self._look() and result.step % self.config.checkpoint_every == 0:
            self.save()

    def _look(self) -> bool:
        """Look at the validation rows if it is time to, and save what was seen; whether it was time."""
        looked = self.stopper is not None and self.stopper.look(self.trainer.steps)
        if looked:
            self.save()
        return looked

    def _is_over(self) -> bool:
        return self.stopper is not None and self.stopper.is_over

    def save(self) -> None:
        """Write everything that a resumed run needs."""
        state = {
            "fingerprint": json.dumps(self.fingerprint),
            "start": self.start,
            "trainer": self.trainer.state_dict(),
            "step": self.trainer.steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "losses": self.losses,
            "stopper": self.stopper.state_dict() if self.stopper else None,
        }
        with self._disk("the training state"):
            write_state(self.folder / STATE, state)
        self.saved_step = self.trainer.steps

    def _read(self) -> dict[str, Any]:
        """The saved state, if it is this run's."""
        path = self.folder / STATE
        state = read_state(path, self.trainer.device, self.label)
        check_same_run(path, json.loads(state["fingerprint"]), self.fingerprint, self.label)
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        """Go back, or on, to what is saved."""
        self.trainer.load_state_dict(state["trainer"])
        self.tokens, self.losses = state["tokens"], state["losses"]
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
        if self.stopper:
            self.stopper.load_state_dict(state["stopper"])
        self.saved_step = self.trainer.steps

    def result(self) -> FitResult:
        """Of all steps."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return FitResult(
            steps=self.trainer.steps,
            final_loss=sum(last) / len(last),
            losses=self.losses,
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            folder=self.folder,
            tokens=self.tokens,
            data_hash=self.fingerprint["data"],
            validation=list(self.stopper.looks) if self.stopper else [],
            best_step=self.stopper.best_step if self.stopper else None,
        )

    def _disk(self, what: str) -> AbstractContextManager[None]:
        step = self.saved_step
        saved = "" if step < 0 else f"The state after step {step} is whole. "
        return disk(self.label, what, self.folder, saved)


def _fingerprint(
    trainer: Trainer,
    examples: Sequence[Example],
    encoded: dict[int, Encoded],
    validation: Sequence[Example],
) -> dict[str, Any]:
    """Everything but the start that the weights depend on."""
    attached, objective = trainer.attached, trainer.objective
    settings = getattr(attached, "config", None)
    named = {} if objective is LIKELIHOOD else {"objective": objective.name}
    if trainer.config.patience:
        named["validation"] = data_hash(validation)
    return {
        "training": trainer.config.model_dump(exclude={"checkpoint_every"}),
        "seed": trainer.seed,
        "data": data_hash(examples),
        "tokens": _tokens_hash(encoded),
        "base": base_digest(attached.model),
        "adapter": None if settings is None else settings.model_dump(),
        "parameters": {n: list(p.shape) for n, p in attached.named_parameters()},
        "trained": list(trainer.parameters),
        **named,
    }


def _tokens_hash(encoded: dict[int, Encoded]) -> str:
    digest = hashlib.sha256()
    for i, row in encoded.items():
        numbers = [i, len(row), *row.input_ids, *row.labels, *row.turn_starts, *row.route]
        digest.update(np.array(numbers, np.int64).tobytes())
        digest.update(np.array([*row.relevance, *row.vision], np.float64).tobytes())
    return digest.hexdigest()
