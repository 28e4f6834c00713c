"""The bare base as an arm: no adapter, asked zero-shot or behind a few examples.

    tasks, max_length = few_shot(inputs, shots=3, seed=0)
    with put_on(model, Bare) as bare:
        measure(bare, tokenizer, tasks, max_length=max_length)

It knows no turn starts, evidence or routes: those arguments are dropped, as for PEFT's methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bem.adapters.budget import Price
from bem.adapters.version import base_digest
from bem.errors import BaseMismatch, CheckpointError, MeasurementError
from bem.experiments.inputs import RunInputs
from bem.experiments.measuring.answers import context_length
from bem.experiments.routing.peer import without_ours
from bem.files import read_json, write_json
from bem.tasks.load import Task
from bem.tasks.shots import with_shots
from bem.training.data import Example, encode

MANIFEST, FORMAT, KIND = "manifest.json", 1, "bare"


class Bare:
    """A base with nothing on it, as `measure` and `measure_latency` take an adapter."""

    def __init__(self, model: Any):
        self.model = self.base = model
        generate = model.generate
        model.__dict__["generate"] = lambda *args, **given: generate(*args, **without_ours(given))
        self._hook = model.register_forward_pre_hook(
            lambda _, args, given: (args, without_ours(given)), with_kwargs=True
        )

    def price(self) -> Price:
        """Nothing."""
        return Price(0, 0.0, ())

    def save(self, folder: Path, shots: int, data_hash: str) -> Path:
        """Write what was asked: the base's hash, how many examples, and of which rows."""
        manifest = {
            "format": FORMAT,
            "kind": KIND,
            "shots": shots,
            "base": base_digest(self.model),
            "data": data_hash,
            "files": {},
        }
        write_json(folder / MANIFEST, manifest)
        return folder

    def detach(self) -> Any:
        """Give back the base as it was."""
        self._hook.remove()
        del self.model.__dict__["generate"]
        return self.model


def load_bare(model: Any, folder: Path) -> Bare:
    """What `Bare.save` wrote, on its base.

    Raises:
        CheckpointError: no such folder, or it holds something else.
        BaseMismatch: saved from another base.
    """
    manifest = read_json(folder / MANIFEST, CheckpointError)
    if manifest.get("kind") != KIND:
        raise CheckpointError(f"{folder} holds no bare base that `Bare.save` wrote.")
    if (actual := base_digest(model)) != manifest["base"]:
        raise BaseMismatch(
            f"{folder} was made for a base with hash {manifest['base'][:12]}, this one has {actual[:12]}."
        )
    return Bare(model)


def few_shot(inputs: RunInputs, shots: int, seed: int) -> tuple[list[Task], int]:
    """The run's tasks with `shots` examples before each held-out row, and the `max_length` in tokens
    under which no example is cut off. Zero-shot both are those of every other arm.

    Raises:
        DataError: too few rows to show (see `with_shots`).
        MeasurementError: a row with its examples is longer than the base's context; names both numbers.
    """
    usual = inputs.config.training.max_length
    if not shots:
        return inputs.tasks, usual
    tasks = with_shots(inputs.tasks, shots, seed)
    asked = [
        (row, task.max_new_tokens)
        for task in tasks
        for rows in (task.dev, *task.variants.values())
        for row in rows
    ]
    return tasks, max([usual, *(_room(inputs, shots, *each) for each in asked)])


def _room(inputs: RunInputs, shots: int, row: Example, max_new_tokens: int) -> int:
    """Tokens of a row with its reference answer, none cut off."""
    context = context_length(inputs.model)
    whole = encode(row, inputs.tokenizer, 1 << 30)
    needed = max(len(whole), whole.prompt_length + max_new_tokens)
    if needed > context:
        raise MeasurementError(
            f"{row.task}: row {row.id!r} behind {shots} examples has {whole.prompt_length} tokens, with its answer "
            f"{needed}; the base has room for {context}. Lower the arm's shots, or take rows that are shorter."
        )
    return len(whole)
