"""Few-shot prompts: held-out rows behind training rows of the same skill, shown as earlier turns.

user       Answer in JSON. play some jazz                      an example: a training row, cue and all
assistant  {"intent": "PlayMusic", "slots": {"genre": "jazz"}}
user       ...                                                 the row's own history, if it has one
user       Answer in JSON. add this song to my gym list        the row itself
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from bem.errors import DataError
from bem.tasks.conversations import SHORTEST_OF, Pools, characters, skill_of
from bem.tasks.record import Task
from bem.training.data import Example


def with_shots(tasks: Sequence[Task], shots: int, seed: int) -> list[Task]:
    """The tasks with every held-out row behind `shots` examples of its own skill; ids and metrics stay.

    The examples are training rows of other groups than the row's and than each other's, drawn by
    `seed` and the row's id, each the shortest of a few. Of a training conversation only its last turn is
    shown, and only where that turn shows its cue: without one it is no example.

    Args:
        shots: examples of each row; 0: the tasks as they are.
        seed: the same one and the same rows give the same examples.
    Raises:
        DataError: a skill has too few such rows; names it and both numbers.
    """
    if not shots:
        return list(tasks)
    pools = _examples(tasks)

    def shown(rows: Sequence[Example]) -> list[Example]:
        return [_behind(row, _drawn(row, pools, shots, seed)) for row in rows]

    return [
        replace(
            task,
            dev=shown(task.dev),
            variants={condition: shown(rows) for condition, rows in task.variants.items()},
        )
        for task in tasks
    ]


def _examples(tasks: Sequence[Task]) -> Pools:
    """Skill -> training rows that show their cue."""
    pools: Pools = {}
    for task in tasks:
        for row in task.train:
            if not row.meta.get("sticky"):
                pools.setdefault(skill_of(row), []).append(row)
    return pools


def _drawn(row: Example, pools: Pools, shots: int, seed: int) -> list[Example]:
    rng = random.Random(f"{seed} shots {row.task} {row.id}")
    pool = [r for r in pools.get(skill_of(row), []) if r.system == row.system]
    free = [r for r in pool if r.group != row.group]
    drawn: list[Example] = []
    for _ in range(shots):
        if not free:
            raise DataError(
                f"Row {row.id!r}: {shots} shots of {skill_of(row)} need as many training rows that show their cue, "
                f"of different groups and none of the row's; there are {len(drawn)}. Lower shots, or raise "
                "data.train_rows."
            )
        drawn.append(min(rng.sample(free, min(SHORTEST_OF, len(free))), key=characters))
        free = [r for r in free if r.group != drawn[-1].group]
    return drawn


def _behind(row: Example, examples: Sequence[Example]) -> Example:
    """The row with the examples before its own history."""
    shown = tuple((example.prompt, example.answer) for example in examples)
    meta = dict(row.meta)
    if "skills" in meta:
        meta["skills"] = [*map(skill_of, examples), *meta["skills"]]
    return replace(row, history=(*shown, *row.history), meta=meta)
