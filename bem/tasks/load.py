"""Tasks by name: the embedded suite, the public sets, and anybody's own rows.

load_task("sig2json")                      real text of this Python installation
load_task("json_snips", root="data")       a public set
load_task(TaskConfig(name="mine", train="a.jsonl", dev="b.jsonl"))
load_task(TaskConfig(name="squad", hf_dataset="rajpurkar/squad", columns={...}))
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from bem.config import DataConfig, RetrievalConfig, TaskConfig, parse
from bem.errors import ConfigError, DataError
from bem.evidence.passages import Passage, read_corpus
from bem.tasks.conversations import characters, into_conversations
from bem.tasks.embedded import EMBEDDED, embedded
from bem.tasks.overlap import (
    question,
    question_and_answer,
    refuse_shared,
    refuse_shared_between,
)
from bem.tasks.public import PUBLIC, public
from bem.tasks.record import METRIC_NAMES, Family, Task
from bem.tasks.retrieval import corpus_of
from bem.tasks.scoring import FORMS
from bem.training.data import Example, load_hf, read_jsonl
from bem.training.rows import file_stem

TASKS: dict[str, Family] = {**EMBEDDED, **{name: spec.family for name, spec in PUBLIC.items()}}
"""Every named task. Your own need no entry: give files or a dataset in the config."""

OWN = Family(
    "your own rows",
    form="text",
    metrics=("em", "f1", "chrf", "loss"),
    primary="em",
    max_new_tokens=64,
)
Part = Literal["train", "dev"]


def load_task(
    entry: str | TaskConfig,
    root: str | Path | None = None,
    train_rows: int | None = None,
    dev_rows: int | None = None,
    seed: int = 0,
    need_train: bool = True,
    longest: int | None = None,
    validation_rows: int | None = None,
) -> Task:
    """A task with its rows; fewer rows are a seeded choice that keeps their order.

    Args:
        entry: a name of TASKS, or a full entry.
        root: folder of the public sets.
        train_rows, dev_rows: None: all of them.
        need_train: False: a set that is for measuring only gets an empty train side.
        longest: rows with more characters, answer included, are left out before the choice.
        validation_rows: training rows that are set aside, see `set_aside`; None: none.
    Raises:
        ConfigError: no such task or metric; the nearest name is shown.
        DataError: no rows where they are needed, or held-out rows that are also training rows.
    """
    config = _full(entry)
    family = _family(config)
    primary, metrics = _metrics(config, family)
    retrieval = config.retrieval or family.retrieval
    # The search goes through the passages of both sides, also when only one is measured.
    searched = retrieval is not None and _has_train(config)
    train = _rows(config, family, "train", root, needed=need_train or searched)
    dev = _rows(config, family, "dev", root, needed=True)
    _refuse_trained_on(config, train, dev)
    if longest is not None:
        train, dev = (_short(rows, longest, config.name) for rows in (train, dev))
    rest, validation = set_aside(train, validation_rows if need_train else None, seed, config.name)
    return Task(
        name=config.name,
        train=_chosen(rest, train_rows, seed, f"{config.name} train") if need_train else [],
        dev=_chosen(dev, dev_rows, seed, f"{config.name} dev"),
        validation=validation,
        metrics=metrics,
        primary=primary,
        max_new_tokens=config.max_new_tokens or family.max_new_tokens,
        form=family.form,
        slice_by=family.slice_by,
        retrieval=retrieval,
        corpus=_corpus(retrieval, [*train, *dev], config.name),
    )


def load_tasks(data: DataConfig, need_train: bool = True) -> list[Task]:
    """All tasks of a config, in its order, as conversations if it says so; sets that are for
    measuring only train nothing.

    Raises:
        DataError: there is nothing to train on, or a held-out row is a training row, of whatever task.
    """
    longest = data.conversations.turn_characters if data.conversations else None
    tasks = [
        load_task(
            entry, data.root, data.train_rows, data.dev_rows, data.seed,
            need_train and not _measuring_only(entry), longest, data.validation_rows,
        )
        for entry in data.tasks
    ]  # fmt: skip
    if need_train and not any(task.train for task in tasks):
        raise DataError(
            f"{', '.join(task.name for task in tasks)}: for measuring only, there is nothing to train on. "
            "Add a task with train rows."
        )
    refuse_shared_between(tasks)
    return into_conversations(tasks, data.conversations) if data.conversations else tasks


def training_mixture(tasks: Sequence[Task]) -> list[Example]:
    """The training rows of all tasks; ids carry the task's name."""
    return [replace(row, id=f"{task.name}/{row.id}") for task in tasks for row in task.train]


def validation_mixture(tasks: Sequence[Task]) -> list[Example]:
    """The rows of all tasks that were set aside; ids carry the task's name."""
    return [replace(row, id=f"{task.name}/{row.id}") for task in tasks for row in task.validation]


def set_aside(
    rows: list[Example], count: int | None, seed: int, name: str
) -> tuple[list[Example], list[Example]]:
    """(rows that are trained on, `count` rows for choosing): no group is on both sides.

    Groups are drawn by the seed until there are enough rows; what a drawn group has beyond that is left
    out on both sides.

    Raises:
        DataError: nothing would be left to train on.
    """
    if not count or not rows:
        return rows, []
    groups = list(dict.fromkeys(row.group for row in rows))
    rng = np.random.default_rng([seed, *f"{name} validation".encode()])
    drawn: set[str] = set()
    aside: list[Example] = []
    for group in rng.permutation(np.array(groups, dtype=object)).tolist():
        if len(aside) >= count:
            break
        drawn.add(group)
        aside += [row for row in rows if row.group == group]
    rest = [row for row in rows if row.group not in drawn]
    if not rest or len(aside) < count:
        raise DataError(
            f"Task {name!r}: setting {count} of {len(rows)} training rows aside, with their groups, leaves "
            f"{len(rest)} to train on. Lower data.validation_rows."
        )
    return rest, aside[:count]


# --- what the entry says --------------------------------------------------------------------------


def _full(entry: str | TaskConfig) -> TaskConfig:
    return parse(TaskConfig, {"name": entry}, "tasks") if isinstance(entry, str) else entry


def _has_own_rows(config: TaskConfig) -> bool:
    return bool(config.train or config.dev or config.hf_dataset)


def _has_train(config: TaskConfig) -> bool:
    spec = PUBLIC.get(config.name)
    return spec is None or "train" in spec.parts or _has_own_rows(config)


def _measuring_only(entry: str | TaskConfig) -> bool:
    config = _full(entry)
    spec = PUBLIC.get(config.name)
    return spec is not None and "train" not in spec.parts and not config.train


def _family(config: TaskConfig) -> Family:
    family = TASKS.get(config.name)
    if family is None and not _has_own_rows(config):
        near = difflib.get_close_matches(config.name, TASKS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(TASKS)}."
        raise ConfigError(
            f"No task {config.name!r}.{hint} A task of your own needs `train` and `dev` files "
            "or an `hf_dataset`."
        )
    return family or OWN


def _metrics(config: TaskConfig, family: Family) -> tuple[str, tuple[str, ...]]:
    """(primary metric, all metrics with it)."""
    primary = config.metric or family.primary
    metrics = tuple(config.metrics or family.metrics)
    metrics = metrics if primary in metrics else (primary, *metrics)
    unknown = [metric for metric in metrics if metric not in METRIC_NAMES]
    if unknown:
        raise ConfigError(
            f"Task {config.name!r}: unknown metric {', '.join(unknown)}. "
            f"Known: {', '.join(METRIC_NAMES)}."
        )
    return primary, metrics


def _corpus(retrieval: RetrievalConfig | None, rows: list[Example], name: str) -> list[Passage]:
    if retrieval is None or retrieval.source != "corpus" or retrieval.index:
        return []
    corpus = corpus_of(rows, [read_corpus(path) for path in retrieval.corpora])
    if not corpus:
        raise DataError(
            f"Task {name!r}: its rows hold no evidence, so there is nothing to search. Give passages: "
            "retrieval.corpora=[file.jsonl] or retrieval.index=FOLDER."
        )
    return corpus


# --- rows -----------------------------------------------------------------------------------------


def _rows(
    config: TaskConfig, family: Family, part: Part, root: str | Path | None, needed: bool
) -> list[Example]:
    instruction = config.instruction or family.instruction
    rows = [
        replace(
            row,
            task=config.name,
            instruction=config.instruction or row.instruction or instruction,
        )
        for row in _read(config, part, root, instruction, needed)
    ]
    for row in rows:
        _check_meta(row, config.name)
    return rows


def _read(
    config: TaskConfig, part: Part, root: str | Path | None, instruction: str, needed: bool
) -> Sequence[Example]:
    """Rows of one side, from the first source that the entry names."""
    name, path = config.name, config.train if part == "train" else config.dev
    if path:
        stem = file_stem(Path(path))
        if (
            config.train
            and config.dev
            and file_stem(Path(config.train)) == file_stem(Path(config.dev))
        ):
            stem = f"{part}-{stem}"  # two files of one name: rows without an id are told apart
        return read_jsonl(path, name, instruction, config.columns, stem)
    if config.hf_dataset:
        split = config.hf_splits.get(part)
        if split is None and needed:
            raise DataError(f"Task {name!r}: hf_splits names no split for {part}.")
        source = (config.hf_dataset, config.hf_config)
        return load_hf(*source, split, config.columns, name, instruction) if split else []
    if config.dev and not needed:
        return []  # own held-out rows of a named task: nothing of its own is asked for
    if name in EMBEDDED:
        return embedded(name, part)
    if name in PUBLIC and (part in PUBLIC[name].parts or needed):
        if root is None:
            raise DataError(f"{name} is a public set: set data.root (--data) to the sets' folder.")
        return public(name, root, part)
    if needed:
        raise DataError(f"Task {name!r} has no {part} rows: give a `{part}` file.")
    return []


def _check_meta(row: Example, name: str) -> None:
    """Fields of meta with a meaning of their own."""
    form = row.meta.get("form")
    if form is not None and (not isinstance(form, str) or form not in FORMS):
        raise DataError(
            f"{name}: row {row.id!r} has the unknown form {form!r}. Known: {', '.join(FORMS)}."
        )
    for key in ("ask", "bare"):
        if not isinstance(row.meta.get(key, ""), str):
            raise DataError(
                f"{name}: row {row.id!r}: meta.{key} must be text, got {row.meta[key]!r:.40}."
            )


def _refuse_trained_on(config: TaskConfig, train: list[Example], dev: list[Example]) -> None:
    """Public sets may ask one question twice where the conversation before it differs."""
    same = question if _has_own_rows(config) else question_and_answer
    refuse_shared(config.name, train, dev, same)


def _short(rows: list[Example], longest: int, name: str) -> list[Example]:
    short = [row for row in rows if characters(row) <= longest]
    if rows and not short:
        raise DataError(
            f"{name}: all {len(rows)} rows are longer than {longest} characters. "
            "Raise data.conversations.turn_characters."
        )
    return short


def _chosen(rows: list[Example], count: int | None, seed: int, key: str) -> list[Example]:
    if count is None or count >= len(rows):
        return rows
    rng = np.random.default_rng([seed, *key.encode()])
    places = rng.choice(len(rows), count, replace=False)
    return [rows[i] for i in sorted(places.tolist())]
