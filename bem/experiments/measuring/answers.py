"""Measure one adapted model on held-out rows: scores per example, answers, cache use.

Every metric is computed for every example (each form of answer has its own rules, see scoring), so
that one Measurement holds several tasks. `quality` is each row's own primary metric on [0, 1]: em,
f1 and validity as they are, chrf and bleu divided by 100, and for loss exp(-loss), the typical
probability of an answer token.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bem.bases import limits
from bem.config import EVIDENCE_FEATURES
from bem.errors import DataError, MeasurementError
from bem.experiments.measuring.cache_use import CacheUse
from bem.experiments.measuring.given import Given, batch_order, give
from bem.experiments.measuring.kept import KeptAnswers, key_of
from bem.files import write_bytes
from bem.stats.measurement import Measurement, RouterFacts
from bem.stats.scores import Metric
from bem.tasks.load import METRIC_NAMES, Task
from bem.tasks.scoring import QUALITY, score
from bem.training.data import Encoded, Example, encode

DECLARED = {QUALITY: Metric(higher_is_better=True, points_per_unit=100.0)}
LEAST_ROOM = 8
"""Fewest tokens that must be left for a prompt."""


@dataclass(frozen=True)
class Answer:
    """The model's answer to one example, and what it is worth."""

    task: str
    example: Example
    prediction: str
    scores: dict[str, float]
    seconds: float
    """Share of the time its batch took when it was computed."""
    cache: CacheUse
    gate: float | None = None
    """Mean head-group gate while the answer begins; None: the adapter has none."""


@dataclass(frozen=True)
class _Examiner:
    """Who is asked, and how."""

    attached: Any
    tokenizer: Any
    metrics: list[str]
    batch_size: int
    max_length: int
    kept: KeptAnswers | None

    @property
    def pad_id(self) -> int:
        token = self.tokenizer.pad_token_id
        return 0 if token is None else token


@dataclass
class _Progress:
    """Examples done of all tasks together."""

    total: int
    on_progress: Callable[[int, int], None] | None
    done: int = 0
    taken_over: int = 0
    """Of those: not computed but kept from before."""

    def add(self, rows: int) -> None:
        self.done += rows
        if self.on_progress and rows:
            self.on_progress(self.done, self.total)


@dataclass
class _Answers:
    """Answers to the rows as they are, and to the same rows on every index."""

    clean: list[Answer] = field(default_factory=list)
    by_index: dict[str, list[Answer]] = field(default_factory=dict)
    """Condition -> answers; of tasks with worse indices only."""


def measure(
    attached: Any,
    tokenizer: Any,
    tasks: Task | Sequence[Task],
    *,
    name: str = "",
    batch_size: int = 16,
    max_length: int = 512,
    predictions: str | Path | None = None,
    kept: KeptAnswers | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Greedy answers and answer losses for all held-out rows of the tasks.

    Args:
        attached: an adapter on its base (`model`, `price`, perhaps `gate_magnitude`).
        name: of the arm.
        batch_size: rows per batch; batches are made of rows that are alike in length.
        max_length: longest prompt in tokens (also limited by the model's context).
        predictions: JSONL file for the answers; written whole or not at all.
        kept: answers from before; a row that it knows is not asked again, whatever is computed is
            added, `meta["taken_over"]` counts rows that it knew. None: every row is asked.
        on_progress: called with (examples done, examples in all).
    Returns:
        metrics [1, examples] for every metric that any of the tasks reports, and `quality`;
        examples in the order of the tasks; clusters; a slice TASK for each of several tasks,
        slices TASK/VALUE for what a task is sliced by, slice `sticky`: conversations whose last turn
        shows no cue, and slice A: strong evidence; with tasks
        that have `variants`, the quality of the same rows on worse indices (RouterFacts.index_swap).
    Raises:
        MeasurementError: no held-out rows, two tasks of the same name, or a full disk.
        DataError: an answer does not fit the context.
    """
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    progress = _Progress(_rows_in(tasks), on_progress)
    reported = {metric for task in tasks for metric in task.metrics} | {"loss"}
    metrics = [metric for metric in METRIC_NAMES if metric in reported]
    examiner = _Examiner(attached, tokenizer, metrics, batch_size, max_length, kept)
    started = time.perf_counter()
    with _evaluating(attached.model):
        answers = _ask(examiner, tasks, progress)
    if predictions is not None:
        _write(Path(predictions), answers.clean)
    meta = {
        "tasks": {t.name: _described(t) for t in tasks},
        "seconds": time.perf_counter() - started,
        **({} if kept is None else {"taken_over": progress.taken_over}),
    }
    return _measurement(name, examiner, tasks, answers, meta)


def _rows_in(tasks: Sequence[Task]) -> int:
    """Rows to be asked, worse indices included."""
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise MeasurementError(f"Task names must differ, got {', '.join(names)}.")
    total = sum(len(task.dev) * (1 + len(task.variants)) for task in tasks)
    if not total:
        raise MeasurementError(
            f"No held-out rows in {', '.join(names) or 'an empty list of tasks'}."
        )
    return total


def _ask(examiner: _Examiner, tasks: Sequence[Task], progress: _Progress) -> _Answers:
    answers = _Answers()
    for task in tasks:
        for condition, rows in {"clean": task.dev, **task.variants}.items():
            given = _ask_rows(examiner, replace(task, dev=rows), progress)
            if condition == "clean":
                answers.clean += given
            if task.variants:
                answers.by_index.setdefault(condition, []).extend(given)
    return answers


def _measurement(
    name: str, examiner: _Examiner, tasks: Sequence[Task], answers: _Answers, meta: dict[str, Any]
) -> Measurement:
    rows, attached = answers.clean, examiner.attached
    price = attached.price() if hasattr(attached, "price") else None
    return Measurement(
        name=name,
        metrics={
            key: np.array([[row.scores[key] for row in rows]])
            for key in (QUALITY, *examiner.metrics)
        },
        example_ids=[f"{row.task}/{row.example.id}" for row in rows],
        clusters=[f"{row.task}/{row.example.group}" for row in rows],
        slices=_slices(tasks, rows),
        declared=DECLARED,
        adapter_parameters=price.parameters if price else None,
        adapter_flops_per_token=price.flops_per_token if price else None,
        kv_hits=[row.cache.hits for row in rows],
        kv_held=[row.cache.held for row in rows],
        kv_needed=[row.cache.needed for row in rows],
        router=_index_swap(answers.by_index) if answers.by_index else None,
        meta=meta,
    )


def _described(task: Task) -> dict[str, Any]:
    return {"rows": len(task.dev), "primary": task.primary, "metrics": list(task.metrics)}


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Every module in eval mode inside, and in its own mode again after (PEFT's wrapper and the
    model inside it need not agree)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def quality(primary: str, scores: dict[str, float]) -> float:
    """A row's primary metric on [0, 1], higher better."""
    value = scores[primary]
    if primary == "loss":
        return math.exp(-value)
    return value / 100 if primary in ("chrf", "bleu") else value


def episode_scores(task: Task, row: Example, answer: str) -> dict[str, float]:
    """What one answer is worth: quality, em, f1, validity; and tool where one is called.

    Raises:
        DataError: the task is judged by its loss, which no answer has.
    """
    form = task.form_of(row)
    names = dict.fromkeys(("em", "f1", "validity", task.primary))
    if "loss" in names:
        raise DataError(f"{row.task}: its primary metric is the loss, which no answer has.")
    scores = {name: score(name, form, answer, row.references) for name in names}
    scores["quality"] = quality(task.primary, scores)
    if form == "tool":
        scores["tool"] = scores["em"]
    return {k: scores[k] for k in ("quality", "em", "f1", "validity", "tool") if k in scores}


def context_length(model: Any, default: int = 1 << 20) -> int:
    """Tokens that the model can hold; default: where its config sets no limit."""
    return limits.context_length(model) or default


def _ask_rows(examiner: _Examiner, task: Task, progress: _Progress) -> list[Answer]:
    """Answers to a task's held-out rows, in their order."""
    tokenizer, context = examiner.tokenizer, context_length(examiner.attached.model)
    room = min(examiner.max_length, context - task.max_new_tokens)
    if room < LEAST_ROOM:
        raise MeasurementError(
            f"{task.name}: answers of {task.max_new_tokens} tokens leave {room} of the model's "
            f"{context} tokens for the prompt. Lower max_new_tokens."
        )
    prompts = [encode(row, tokenizer, room, with_answer=False) for row in task.dev]
    longest = min(context, examiner.max_length + task.max_new_tokens)
    wholes = [encode(row, tokenizer, longest) for row in task.dev]
    given = _asked(examiner, prompts, wholes, task.max_new_tokens, progress)
    return [_answer(examiner, task, *row) for row in zip(task.dev, given, strict=True)]


def _asked(
    examiner: _Examiner,
    prompts: Sequence[Encoded],
    wholes: Sequence[Encoded],
    max_new_tokens: int,
    progress: _Progress,
) -> list[Given]:
    """What the model gives to each row, batch by batch; rows that were kept from before are not asked."""
    kept, size = examiner.kept, examiner.batch_size
    keys = (
        [key_of(*row, max_new_tokens) for row in zip(prompts, wholes, strict=True)] if kept else []
    )
    given: dict[int, Given] = {}
    if kept:
        kept.refresh()
        given = {i: found for i, key in enumerate(keys) if (found := kept.get(key))}
        progress.taken_over += len(given)
        progress.add(len(given))
    order = [i for i in batch_order(prompts, wholes) if i not in given]
    for at in range(0, len(order), size):
        rows = order[at : at + size]
        batch = [(prompts[i], wholes[i]) for i in rows]
        new = give(examiner.attached, examiner.tokenizer, batch, max_new_tokens, examiner.pad_id)
        if kept:
            kept.add({keys[i]: each for i, each in zip(rows, new, strict=True)})
        given |= dict(zip(rows, new, strict=True))
        progress.add(len(rows))
    return [given[i] for i in range(len(prompts))]


def _answer(examiner: _Examiner, task: Task, example: Example, given: Given) -> Answer:
    """What was given, read and scored."""
    prediction = examiner.tokenizer.decode(given.ids, skip_special_tokens=True).strip()
    scores = _scores(examiner.metrics, task, example, prediction, given.loss)
    return Answer(task.name, example, prediction, scores, given.seconds, given.cache, given.gate)


def _scores(
    metrics: Sequence[str], task: Task, example: Example, prediction: str, loss: float
) -> dict[str, float]:
    form = task.form_of(example)
    scores = {
        metric: score(metric, form, prediction, example.references)
        for metric in dict.fromkeys((*metrics, task.primary))
        if metric != "loss"
    }
    scores["loss"] = loss
    scores[QUALITY] = quality(task.primary, scores)
    return scores


def _index_swap(by_index: dict[str, list[Answer]]) -> RouterFacts:
    return RouterFacts(
        index_swap={c: [[a.scores[QUALITY] for a in row]] for c, row in by_index.items()},
        clusters=[f"{a.task}/{a.example.group}" for a in by_index["clean"]],
        answer_loss={c: [[a.scores["loss"] for a in row]] for c, row in by_index.items()},
    )


def _slices(tasks: Sequence[Task], answers: Sequence[Answer]) -> dict[str, list[bool]]:
    """Each task, and each value of what a task is sliced by, where there is more than one."""
    parts: dict[str, list[bool]] = {}
    for task in tasks:
        if len(tasks) > 1:
            parts[task.name] = [answer.task == task.name for answer in answers]
        for key in task.slice_by:
            values = dict.fromkeys(str(row.meta[key]) for row in task.dev if key in row.meta)
            for value in values if len(values) > 1 else ():
                parts[f"{task.name}/{value}"] = [
                    a.task == task.name and str(a.example.meta.get(key)) == value for a in answers
                ]
    sticky = [bool(a.example.meta.get("sticky")) for a in answers]
    if any(sticky):
        parts["sticky"] = sticky
    strong = [_is_strong(task, a.example) for task in tasks for a in answers if a.task == task.name]
    if any(strong):
        parts["A"] = strong
    return parts


def _is_strong(task: Task, row: Example) -> bool:
    """The evidence covers the question and agrees with itself."""
    if task.retrieval is None or not row.relevance:
        return False
    features = dict(zip(EVIDENCE_FEATURES, row.relevance, strict=True))
    return min(features["coverage"], features["consistency"]) >= task.retrieval.slice_threshold


def _write(path: Path, answers: Sequence[Answer]) -> None:
    try:
        write_bytes(path, b"".join(_line(_row(answer)) for answer in answers))
    except OSError as error:
        raise MeasurementError(f"{path} could not be written: {error}.") from error


def _line(row: dict[str, Any]) -> bytes:
    """JSON in UTF-8; a row with half a surrogate pair, which UTF-8 has no form for, in ASCII."""
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode("ascii") + b"\n"


def _row(answer: Answer) -> dict[str, Any]:
    """A line of the predictions file."""
    example = answer.example
    return {
        "id": f"{answer.task}/{example.id}",
        "task": answer.task,
        "group": example.group,
        "input": example.prompt,
        "prediction": answer.prediction,
        "references": list(example.references),
        "scores": {key: round(value, 6) for key, value in answer.scores.items()},
        **(
            {"history": example.history, "skills": example.meta["skills"]}
            if "skills" in example.meta
            else {}
        ),
        **({"relevance": list(example.relevance)} if example.relevance else {}),
        **({"vision": list(example.vision)} if example.vision else {}),
        **({"gate": round(answer.gate, 6)} if answer.gate is not None else {}),
    }
