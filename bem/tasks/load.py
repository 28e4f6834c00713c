"""Tasks by name: the embedded suite, the public sets, and anybody's own rows.

load_task("sig2json")                      real text of this Python installation
load_task("json_snips", root="data")       a public set
load_task(TaskConfig(name="mine", train="a.jsonl", dev="b.jsonl"))
load_task(TaskConfig(name="squad", hf_dataset="rajpurkar/squad", columns={...}))
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bem.config import DataConfig, RetrievalConfig, TaskConfig, parse
from bem.errors import ConfigError, DataError
from bem.evidence.passages import Passage, read_corpus
from bem.tasks.conversations import characters, into_conversations
from bem.tasks.embedded import EMBEDDED, embedded
from bem.tasks.public import PUBLIC, public
from bem.tasks.record import Family
from bem.tasks.retrieval import corpus_of
from bem.tasks.scoring import FORMS
from bem.training.data import Example, load_hf, read_jsonl

TASKS: dict[str, Family] = {**EMBEDDED, **{name: spec.family for name, spec in PUBLIC.items()}}
"""Every named task. Your own need no entry: give files or a dataset in the config."""

OWN = Family(
    "your own rows",
    form="text",
    metrics=("em", "f1", "chrf", "loss"),
    primary="em",
    max_new_tokens=64,
)
METRIC_NAMES = ("em", "f1", "validity", "chrf", "bleu", "loss")


@dataclass(frozen=True)
class Task:
    """Rows to train on, rows to measure on, and how to score them."""

    name: str
    train: list[Example] = field(repr=False)
    dev: list[Example] = field(repr=False)
    """Held out."""
    metrics: tuple[str, ...]
    primary: str
    max_new_tokens: int
    form: str = "text"
    """Key of scoring.FORMS for rows that do not say (meta["form"])."""
    slice_by: tuple[str, ...] = ()
    retrieval: RetrievalConfig | None = None
    """How evidence is found for the rows (see `retrieval.with_evidence`); None: as it stands in them."""
    corpus: list[Passage] = field(default_factory=list, repr=False)
    """What is searched."""
    variants: dict[str, list[Example]] = field(default_factory=dict, repr=False)
    """The held-out rows with worse evidence, by condition."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What finding the evidence brought to light: leaked rows, places of the gold passages."""

    def form_of(self, example: Example) -> str:
        return example.meta.get("form", self.form)


def load_task(
    entry: str | TaskConfig,
    root: str | Path | None = None,
    train_rows: int | None = None,
    dev_rows: int | None = None,
    seed: int = 0,
    need_train: bool = True,
    longest: int | None = None,
) -> Task:
    """A task with its rows; fewer rows are a seeded choice that keeps their order.

    Args:
        entry: a name of TASKS, or a full entry.
        root: folder of the public sets.
        train_rows, dev_rows: None: all of them.
        need_train: False: a set that is for measuring only gets an empty train side.
        longest: rows with more characters, answer included, are left out before the choice.
    Raises:
        ConfigError: no such task or metric; the nearest name is shown.
        DataError: no rows where they are needed.
    """
    config = parse(TaskConfig, {"name": entry}, "tasks") if isinstance(entry, str) else entry
    family = TASKS.get(config.name)
    own_rows = bool(config.train or config.dev or config.hf_dataset)
    if family is None and not own_rows:
        near = difflib.get_close_matches(config.name, TASKS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(TASKS)}."
        raise ConfigError(
            f"No task {config.name!r}.{hint} A task of your own needs `train` and `dev` files "
            "or an `hf_dataset`."
        )
    family = family or OWN
    instruction = config.instruction or family.instruction
    primary = config.metric or family.primary
    metrics = tuple(config.metrics or family.metrics)
    metrics = metrics if primary in metrics else (primary, *metrics)
    unknown = [metric for metric in metrics if metric not in METRIC_NAMES]
    if unknown:
        raise ConfigError(
            f"Task {config.name!r}: unknown metric {', '.join(unknown)}. "
            f"Known: {', '.join(METRIC_NAMES)}."
        )
    retrieval = config.retrieval or family.retrieval
    has_train = config.name not in PUBLIC or "train" in PUBLIC[config.name].parts or own_rows
    train = _rows(
        config, "train", root, instruction, needed=need_train or bool(retrieval and has_train)
    )
    dev = _rows(config, "dev", root, instruction, needed=True)
    if longest is not None:
        train, dev = (_short(rows, longest, config.name) for rows in (train, dev))
    corpus = []
    if retrieval is not None and retrieval.source == "corpus" and not retrieval.index:
        corpus = corpus_of([*train, *dev], [read_corpus(path) for path in retrieval.corpora])
        _need_passages(corpus, config.name)
    return Task(
        name=config.name,
        train=_chosen(train, train_rows, seed, f"{config.name} train") if need_train else [],
        dev=_chosen(dev, dev_rows, seed, f"{config.name} dev"),
        metrics=metrics,
        primary=primary,
        max_new_tokens=(
            config.max_new_tokens
            if "max_new_tokens" in config.model_fields_set
            else family.max_new_tokens
        ),
        form=family.form,
        slice_by=family.slice_by,
        retrieval=retrieval,
        corpus=corpus,
    )


def load_tasks(data: DataConfig, need_train: bool = True) -> list[Task]:
    """All tasks of a config, in its order, as conversations if it says so; sets that are for
    measuring only train nothing.

    Raises:
        DataError: there is nothing to train on.
    """
    longest = data.conversations.turn_characters if data.conversations else None
    tasks = [
        load_task(
            entry, data.root, data.train_rows, data.dev_rows, data.seed,
            need_train and not _measuring_only(entry), longest,
        )
        for entry in data.tasks
    ]  # fmt: skip
    if need_train and not any(task.train for task in tasks):
        raise DataError(
            f"{', '.join(task.name for task in tasks)}: for measuring only, there is nothing to train on. "
            "Add a task with train rows."
        )
    return into_conversations(tasks, data.conversations) if data.conversations else tasks


def _measuring_only(entry: str | TaskConfig) -> bool:
    config = parse(TaskConfig, {"name": entry}, "tasks") if isinstance(entry, str) else entry
    spec = PUBLIC.get(config.name)
    return spec is not None and "train" not in spec.parts and not config.train


def _need_passages(corpus: list[Passage], name: str) -> None:
    if not corpus:
        raise DataError(
            f"Task {name!r}: its rows hold no evidence, so there is nothing to search. Give passages: "
            "retrieval.corpora=[file.jsonl] or retrieval.index=FOLDER."
        )


def training_mixture(tasks: Sequence[Task]) -> list[Example]:
    """The training rows of all tasks; ids carry the task's name."""
    return [replace(row, id=f"{task.name}/{row.id}") for task in tasks for row in task.train]


def _rows(
    config: TaskConfig,
    part: Literal["train", "dev"],
    root: str | Path | None,
    instruction: str,
    needed: bool,
) -> list[Example]:
    name, path = config.name, config.train if part == "train" else config.dev
    if path:
        rows = read_jsonl(path, task=name, instruction=instruction)
    elif config.hf_dataset:
        split = config.hf_splits.get(part)
        if split is None and not needed:
            return []
        if split is None:
            raise DataError(f"Task {name!r}: hf_splits names no split for {part}.")
        rows = load_hf(
            config.hf_dataset, config.hf_config, split, config.columns, name, instruction
        )
    elif name in EMBEDDED:
        rows = list(embedded(name, part))
    elif name in PUBLIC and (part in PUBLIC[name].parts or needed):
        if root is None:
            raise DataError(f"{name} is a public set: set data.root (--data) to the sets' folder.")
        rows = public(name, root, part)
    elif needed:
        raise DataError(f"Task {name!r} has no {part} rows: give a `{part}` file.")
    else:
        return []
    rows = [
        replace(row, task=name, instruction=config.instruction or row.instruction or instruction)
        for row in rows
    ]
    for row in rows:
        form = row.meta.get("form")
        if form is not None and form not in FORMS:
            raise DataError(
                f"{name}: row {row.id!r} has the unknown form {form!r}. Known: {', '.join(FORMS)}."
            )
    return rows


def _short(rows: list[Example], longest: int, name: str) -> list[Example]:
    kept = [row for row in rows if characters(row) <= longest]
    if rows and not kept:
        raise DataError(
            f"{name}: all {len(rows)} rows are longer than {longest} characters. "
            "Raise data.conversations.turn_characters."
        )
    return kept


def _chosen(rows: list[Example], count: int | None, seed: int, key: str) -> list[Example]:
    if count is None or count >= len(rows):
        return rows
    words = [seed, *key.encode()]
    keep = np.random.default_rng(words).choice(len(rows), count, replace=False)
    return [rows[i] for i in sorted(keep.tolist())]
