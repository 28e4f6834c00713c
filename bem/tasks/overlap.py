"""Held-out rows that were trained on: a verdict on them says nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from bem.errors import DataError
from bem.tasks.record import Task
from bem.training.data import Example


def question(row: Example) -> Hashable:
    """All that the model reads of a row, white space aside."""
    return tuple(" ".join(text.split()) for text in _texts(row))


def question_and_answer(row: Example) -> Hashable:
    """All that the model reads, to the letter, and what it learns to say."""
    return _texts(row), row.references


def _texts(row: Example) -> tuple[str, ...]:
    return (row.system, *(text for turn in row.history for text in turn), row.prompt)


def refuse_shared(
    name: str,
    train: Sequence[Example],
    dev: Sequence[Example],
    same: Callable[[Example], Hashable] = question,
) -> None:
    """Refuse a task whose held-out rows are also training rows.

    Rows that are merely alike are not looked for; tasks with retrieval leave them out (see
    `retrieval.with_evidence`).

    Args:
        same: what two rows must have in common to count, besides an equal id.
    Raises:
        DataError: counts the held-out rows with the id, and those with the input, of a training row.
    """
    ids, inputs = {row.id for row in train}, {same(row) for row in train}
    shared_ids = [row for row in dev if row.id in ids]
    shared_inputs = [row for row in dev if same(row) in inputs]
    if shared_ids or shared_inputs:
        raise DataError(
            f"Task {name!r}: of {len(dev)} held-out rows {len(shared_ids)} have the id of a training row and "
            f"{len(shared_inputs)} its input, as row {(shared_inputs or shared_ids)[0].id!r}. What was "
            "trained on cannot be held out: take them out of one side, and split by source document. "
            "Ids that merely start anew in each file: make them differ, or leave them out."
        )


def refuse_shared_between(tasks: Sequence[Task]) -> None:
    """Refuse held-out rows of one task that are training rows of another one.

    Raises:
        DataError: names both tasks.
    """
    trained_by = {question_and_answer(row): task.name for task in tasks for row in task.train}
    for task in tasks:
        shared = [row for row in task.dev if question_and_answer(row) in trained_by]
        if shared:
            other = trained_by[question_and_answer(shared[0])]
            raise DataError(
                f"{len(shared)} of {len(task.dev)} held-out rows of task {task.name!r} are training rows of "
                f"{other!r}, as row {shared[0].id!r}: the same prompt and answer. Take them out of one side."
            )
