"""What every cell of a run is made from: rows, base and folder, loaded once per process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bem.adapters.version import base_digest
from bem.bases.load import load_base
from bem.config import ExperimentConfig
from bem.errors import ConfigError
from bem.experiments.events import Event, Show
from bem.runs.folder import RunFolder
from bem.tasks.load import Task, load_tasks, training_mixture, validation_mixture
from bem.tasks.retrieval import with_evidence
from bem.training.data import Encoded, Example, data_hash, encode


@dataclass(frozen=True)
class RunInputs:
    """The one owner of a run's base and rows; everybody else is handed this."""

    config: ExperimentConfig
    folder: RunFolder
    tasks: list[Task]
    examples: list[Example]
    """Training rows of all tasks."""
    model: Any
    """The bare base. Adapted inside `with adapted(...)` only."""
    tokenizer: Any
    device: str
    data: dict[str, str]
    """Hashes of the training rows and of each task's held-out rows."""
    base: str
    """Digest of the base's weights, computed once."""
    validation: list[Example] = field(default_factory=list)
    """Rows of all tasks that are set aside for choosing."""

    @property
    def pad_id(self) -> int:
        """Token that fills up batches."""
        token = self.tokenizer.pad_token_id
        return 0 if token is None else token


def load_inputs(config: ExperimentConfig, folder: RunFolder, show: Show) -> RunInputs:
    """Read the rows, find their evidence, load the base, and set the number of torch threads."""
    show(Event("reading the data"))
    tasks = [
        with_evidence(task, folder.evidence, tell_search(task, show))
        for task in load_tasks(config.data, need_train=config.reads_training_rows)
    ]
    examples, validation = training_mixture(tasks), validation_mixture(tasks)
    device = device_of(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    show(Event("loading the base"))
    model, tokenizer = load_base(config.base, device, config.dtype)
    hashes = {
        "train": data_hash(examples),
        **({"validation": data_hash(validation)} if validation else {}),
        **{f"{task.name} dev": data_hash(task.dev) for task in tasks},
    }
    return RunInputs(
        config, folder, tasks, examples, model, tokenizer, device, hashes, base_digest(model),
        validation,
    )  # fmt: skip


def encoded_rows(inputs: RunInputs, rows: Sequence[Example]) -> list[Encoded]:
    """Rows with their answers, cut as in training."""
    length = inputs.config.training.max_length
    return [encode(row, inputs.tokenizer, length) for row in rows]


def device_of(config: ExperimentConfig) -> str:
    """The device that a config means here; `auto` is the first GPU, else the CPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    gpus = torch.cuda.device_count()
    if config.device == "auto":
        return "cuda" if gpus else "cpu"
    present = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if config.device not in present:
        raise ConfigError(f"No device {config.device!r} here. There is: {', '.join(present)}.")
    return config.device


def tell_search(task: Task, show: Show) -> Callable[[int, int], None]:
    """Passes on how far the search for a task's evidence is, every sixteenth row."""

    def tell(done: int, total: int) -> None:
        if done % 16 == 0 or done == total:
            event = Event("finding evidence", done=done, total=total, detail=task.name)
            show(event.at(event.stage, final=done == total))

    return tell
