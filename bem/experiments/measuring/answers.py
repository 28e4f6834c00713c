"""Measure one adapted model on held-out rows: scores per example, answers kept, cache use counted.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bem.config import EVIDENCE_FEATURES
from bem.errors import MeasurementError
from bem.stats.measurement import Measurement, RouterFacts
from bem.stats.scores import Metric
from bem.tasks.load import METRIC_NAMES, Task
from bem.tasks.scoring import QUALITY, score
from bem.training.answers import greedy_answers
from bem.training.data import IGNORED, Encoded, Example, collate, encode
from bem.training.fit import write_atomically
from bem.training.losses import answer_logits, answer_nll

if TYPE_CHECKING:
    from bem.adapters.attach import Attached

DECLARED = {QUALITY: Metric(higher_is_better=True, points_per_unit=100.0)}
LOGITS_AT_ONCE = 1 << 27
"""Largest number of logits of one forward pass while answer losses are measured (half a GiB)."""


@dataclass(frozen=True)
class Answer:
    """What the model said to one example, and what that is worth."""

    task: str
    example: Example
    prediction: str
    scores: dict[str, float]
    seconds: float
    """Share of the time its batch took."""
    gate: float | None = None
    """Mean head-group gate while the answer begins; None: the adapter has none."""


@dataclass(frozen=True)
class CacheUse:
    """Keys and values at the decode steps of one request."""

    hits: float
    """Entries that were there."""
    needed: float
    """Entries of all tokens before the one being decoded."""


def measure(
    attached: Attached,
    tokenizer: Any,
    tasks: Task | Sequence[Task],
    *,
    name: str = "",
    batch_size: int = 16,
    max_length: int = 512,
    predictions: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Greedy answers and answer losses for all held-out rows of the tasks.

    Args:
        name: of the arm.
        batch_size: rows per batch; batches are made of rows that are alike in length.
        max_length: longest prompt in tokens (also limited by the model's context).
        predictions: JSONL file for the answers; written whole or not at all.
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
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise MeasurementError(f"Task names must differ, got {', '.join(names)}.")
    total = sum(len(task.dev) * (1 + len(task.variants)) for task in tasks)
    if not total:
        raise MeasurementError(
            f"No held-out rows in {', '.join(names) or 'an empty list of tasks'}."
        )
    wanted = {metric for task in tasks for metric in task.metrics} | {"loss"}
    metrics = [metric for metric in METRIC_NAMES if metric in wanted]
    started = time.perf_counter()
    answers: list[Answer] = []
    uses: list[CacheUse] = []
    swapped: dict[str, list[Answer]] = {}
    asked = 0
    with _evaluating(attached.model):
        for task in tasks:
            for condition, rows in {"clean": task.dev, **task.variants}.items():
                tick = lambda done, b=asked: on_progress(b + done, total) if on_progress else None  # noqa: E731
                found, used = _measure_task(
                    attached,
                    tokenizer,
                    replace(task, dev=rows),
                    metrics,
                    batch_size,
                    max_length,
                    tick,
                )
                asked += len(rows)
                if condition == "clean":
                    answers += found
                    uses += used
                if task.variants:
                    swapped[condition] = swapped.get(condition, []) + found
    if predictions is not None:
        rows = (json.dumps(_row(answer), ensure_ascii=False) + "\n" for answer in answers)
        try:
            write_atomically(Path(predictions), "".join(rows).encode("utf-8", "surrogatepass"))
        except OSError as error:
            raise MeasurementError(f"{predictions} could not be written: {error}.") from error
    price = attached.price() if hasattr(attached, "price") else None
    return Measurement(
        name=name,
        metrics={
            key: np.array([[answer.scores[key] for answer in answers]])
            for key in (QUALITY, *metrics)
        },
        example_ids=[f"{answer.task}/{answer.example.id}" for answer in answers],
        clusters=[f"{answer.task}/{answer.example.group}" for answer in answers],
        slices=_slices(tasks, answers),
        declared=DECLARED,
        adapter_parameters=price.parameters if price else None,
        adapter_flops_per_token=price.flops_per_token if price else None,
        kv_hits=[use.hits for use in uses],
        kv_needed=[use.needed for use in uses],
        router=_index_swap(swapped) if swapped else None,
        meta={
            "tasks": {
                task.name: {
                    "rows": len(task.dev),
                    "primary": task.primary,
                    "metrics": list(task.metrics),
                }
                for task in tasks
            },
            "seconds": time.perf_counter() - started,
        },
    )


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


def context_length(model: Any, default: int = 1 << 20) -> int:
    """Tokens that the model can hold, if its config says so."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return default


def _measure_task(
    attached: Attached,
    tokenizer: Any,
    task: Task,
    metrics: list[str],
    batch_size: int,
    max_length: int,
    tick: Callable[[int], None],
) -> tuple[list[Answer], list[CacheUse]]:
    model = attached.model
    context = context_length(model)
    room = min(max_length, context - task.max_new_tokens)
    if room < 8:
        raise MeasurementError(
            f"{task.name}: answers of {task.max_new_tokens} tokens leave {room} of the model's "
            f"{context} tokens for the prompt. Lower max_new_tokens."
        )
    prompts = [encode(row, tokenizer, room, with_answer=False) for row in task.dev]
    longest = min(context, max_length + task.max_new_tokens)
    wholes = [encode(row, tokenizer, longest) for row in task.dev]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    order = _batch_order(prompts, wholes)
    answers: dict[int, Answer] = {}
    uses: dict[int, CacheUse] = {}
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        started = time.perf_counter()
        said, used = _generate(model, tokenizer, [prompts[i] for i in rows], task.max_new_tokens)
        losses, gates = answer_losses(attached, [wholes[i] for i in rows], pad_id)
        seconds = (time.perf_counter() - started) / len(rows)
        for i, ids, use, loss, gate in zip(rows, said, used, losses, gates, strict=True):
            example = task.dev[i]
            prediction = tokenizer.decode(ids, skip_special_tokens=True).strip()
            scores = {
                metric: score(metric, task.form_of(example), prediction, example.references)
                for metric in dict.fromkeys((*metrics, task.primary))
                if metric != "loss"
            }
            scores["loss"] = loss
            scores[QUALITY] = quality(task.primary, scores)
            answers[i] = Answer(task.name, example, prediction, scores, seconds, gate)
            uses[i] = use
        tick(len(answers))
    return [answers[i] for i in range(len(prompts))], [uses[i] for i in range(len(prompts))]


def _batch_order(prompts: list[Encoded], wholes: list[Encoded]) -> list[int]:
    """Rows that will likely stop after as many tokens side by side, then by prompt length.

    A batch decodes until its last row has stopped; prompts of other lengths only cost padding.
    """

    def key(i: int) -> tuple[int, int]:
        return (len(wholes[i]) - wholes[i].prompt_length) // 8, len(prompts[i])

    return sorted(range(len(prompts)), key=key, reverse=True)


@torch.inference_mode()
def _generate(
    model: Any, tokenizer: Any, prompts: list[Encoded], max_new_tokens: int
) -> tuple[list[list[int]], list[CacheUse]]:
    """Greedy answers without what follows their end, and the cache use of each row."""
    with _counted(model) as calls:
        answers = greedy_answers(model, tokenizer, prompts, max_new_tokens)
    lengths = [len(prompt) for prompt in prompts]
    return answers, [
        _cache_use(calls, length, len(answer))
        for length, answer in zip(lengths, answers, strict=True)
    ]


def _cache_use(calls: list[tuple[int, int]], prompt: int, answer: int) -> CacheUse:
    """Sum over the decode steps of one row (the first call is the prefill, which needs nothing).

    `calls` holds (columns in the cache, columns handed in) of each forward pass. A step that hands
    in one column reuses all earlier ones; each further column is an entry computed again.
    """
    hits = needed = 0
    for step, (_, handed_in) in enumerate(calls[1 : answer + 1], 1):
        before = prompt + step - 1  # tokens of this row before the one whose successor is decoded
        needed += before
        hits += max(0, before - (handed_in - 1))
    return CacheUse(hits, needed)


@contextmanager
def _counted(model: Any) -> Iterator[list[tuple[int, int]]]:
    """What each forward pass found in the cache and was handed in, counted at the base model."""
    calls: list[tuple[int, int]] = []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def note(module: Any, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        calls.append((cache.get_seq_length() if cache is not None else 0, ids.shape[1]))

    handle = inner.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@torch.inference_mode()
def answer_losses(
    attached: Any, rows: list[Encoded], pad_id: int
) -> tuple[list[float], list[float | None]]:
    """Mean negative log-likelihood of each row's last answer and its end, in nats per token; and the
    mean gate at the answer's first token, if there are gates."""
    model = attached.model
    longest = max(len(row) for row in rows)
    vocabulary = getattr(model.config, "vocab_size", None) or 1 << 16
    at_once = max(1, LOGITS_AT_ONCE // (longest * vocabulary))
    losses: list[float] = []
    gates: list[float | None] = []
    for i in range(0, len(rows), at_once):
        batch = collate(rows[i : i + at_once], pad_id)
        for row, labels in zip(rows[i : i + at_once], batch["labels"], strict=True):
            labels[: len(labels) - (len(row) - row.prompt_length)] = IGNORED  # earlier turns
        batch = {key: value.to(model.device) for key, value in batch.items()}
        sums, counts = answer_nll(answer_logits(model, batch), batch["labels"])
        losses += (sums / counts).tolist()
        found = attached.gate_magnitude() if hasattr(attached, "gate_magnitude") else None
        width = batch["labels"].shape[1]
        for r, row in enumerate(rows[i : i + at_once]):
            first = width - len(row) + row.prompt_length
            gates.append(None if found is None else float(found[r, first]))
    return losses, gates


def _index_swap(swapped: dict[str, list[Answer]]) -> RouterFacts:
    clean = swapped["clean"]
    return RouterFacts(
        index_swap={c: [[a.scores[QUALITY] for a in row]] for c, row in swapped.items()},
        clusters=[f"{a.task}/{a.example.group}" for a in clean],
        answer_loss={c: [[a.scores["loss"] for a in row]] for c, row in swapped.items()},
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
    known = dict(zip(EVIDENCE_FEATURES, row.relevance, strict=True))
    return min(known["coverage"], known["consistency"]) >= task.retrieval.slice_threshold


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
        **({"gate": round(answer.gate, 6)} if answer.gate is not None else {}),
    }
