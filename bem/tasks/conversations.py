"""Conversations whose turns switch skills: what was asked stands earlier, and changes on the way.

Every row becomes the last turn of a conversation. The turns before it are other rows of the same side
(train or dev) and of other groups (stories, tables, files), so that no turn answers a later one. The
next turn asks for another skill with `switch_rate`; the turn after that comes back with `return_rate`.

A skill is a task, or what a task with a cue is asked for (`snips_forms/json`). A cue holds until its
task is asked for something else: turns for which it stands show only the bare question
(`meta["bare"]`), however many turns of other tasks lie between. That is what a router has to carry.

    user       Answer in JSON. [other requests] play some jazz
    assistant  {"intent": "PlayMusic", "slots": {"genre": "jazz"}}
    user       Write the command. List all files
    assistant  ls -a
    user       add this song to my gym list                  JSON again: no cue
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from bem.config import ConversationConfig
from bem.errors import ConfigError, DataError
from bem.tasks.record import Task
from bem.training.data import Example

Pools = dict[str, list[Example]]
"""skill -> rows of one side."""

DRAWN, SHORTEST_OF = 8, 4
"""Rows drawn for an earlier turn, and of how many usable ones the shortest is taken."""


def skill_of(row: Example) -> str:
    """`snips_forms/json` for a row that says what it asks for, else its task."""
    ask = row.meta.get("ask")
    return row.task if ask is None else f"{row.task}/{ask}"


def skills(tasks: Sequence[Task]) -> list[str]:
    """The skills of all rows and of the turns before them: tasks in their order, what is asked for by name."""
    rows = [row for task in tasks for row in task.train + task.dev]
    found = {skill for row in rows for skill in (skill_of(row), *row.meta.get("skills", ()))}
    order = {task.name: place for place, task in enumerate(tasks)}
    return sorted(found, key=lambda skill: (order.get(skill.partition("/")[0], len(order)), skill))


def characters(row: Example) -> int:
    """Length of a turn: what the user says and its answer, and the system message."""
    return len(row.prompt) + len(row.answer) + len(row.system)


def into_conversations(tasks: Sequence[Task], config: ConversationConfig) -> list[Task]:
    """Every row with a `history` that ends in it; id, group, references and metrics stay.

    meta gains `skills` (of all turns, the row's own last) and `sticky` (the row shows no cue: it
    stands in an earlier turn). The same seed and rows give the same conversations.

    Raises:
        ConfigError: one skill alone, several system messages, or a task whose rows have a history or find
            their evidence later.
        DataError: a row is longer than a whole conversation may be.
    """
    for task in tasks:
        if task.retrieval is not None or any(row.history for row in task.train + task.dev):
            reason = "finds its evidence later" if task.retrieval else "has rows with a history"
            raise ConfigError(f"Task {task.name!r} {reason}: it cannot be one of `conversations`.")
    systems = sorted({row.system for task in tasks for row in task.train + task.dev})
    if len(systems) > 1:
        raise ConfigError(
            f"The rows have {len(systems)} system messages ({systems[0]!r:.40}, {systems[1]!r:.40}, ...), a "
            "conversation has one: give all rows the same, or move what differs into their `instruction`."
        )
    pools = {part: _by_skill(tasks, part, config) for part in ("train", "dev")}
    return [
        replace(
            task,
            train=[_conversation(row, "train", pools["train"], config) for row in task.train],
            dev=[_conversation(row, "dev", pools["dev"], config) for row in task.dev],
            validation=[
                _conversation(row, "validation", pools["train"], config) for row in task.validation
            ],
        )
        for task in tasks
    ]


def _by_skill(
    tasks: Sequence[Task], part: Literal["train", "dev"], config: ConversationConfig
) -> Pools:
    pools: Pools = {}
    for task in tasks:
        for row in getattr(task, part):
            pools.setdefault(skill_of(row), []).append(row)
    if len(pools) == 1 and config.switch_rate > 0 and config.turns > 1:
        raise ConfigError(
            f"The {part} rows have one skill, {next(iter(pools))}: turns cannot switch. "
            "Add a task, or set data.conversations.switch_rate=0."
        )
    return pools


def _conversation(row: Example, part: str, pools: Pools, config: ConversationConfig) -> Example:
    rng = random.Random(f"{config.seed} {part} {row.task} {row.id}")
    turns = _fitting([*_earlier(row, pools, config, rng), row], config)
    return replace(
        turns[-1],
        history=tuple((turn.prompt, turn.answer) for turn in turns[:-1]),
        meta={
            **row.meta,
            "skills": [skill_of(turn) for turn in turns],
            "sticky": turns[-1] is not row,
        },
    )


def _earlier(
    row: Example, pools: Pools, config: ConversationConfig, rng: random.Random
) -> list[Example]:
    """Rows of the turns before `row`, drawn backwards; `after` is the skill of the turn after next.

    Short rows are preferred; there are fewer turns where no other group is left.
    """
    skill, after, seen, turns = skill_of(row), "", {row.group}, []
    for _ in range(config.turns - 1):
        others = [other for other in pools if other != skill]
        here = skill
        if others and rng.random() < config.switch_rate:
            back = after in others and rng.random() < config.return_rate
            skill = after if back else rng.choice(others)
        after = here
        drawn = rng.sample(pools[skill], min(DRAWN, len(pools[skill])))
        free = [r for r in drawn if r.group not in seen] or [
            r for r in pools[skill] if r.group not in seen
        ]
        if not free:
            break
        turn = min(free[:SHORTEST_OF], key=characters)
        seen.add(turn.group)
        turns.insert(0, turn)
    return turns


def _fitting(rows: list[Example], config: ConversationConfig) -> list[Example]:
    """The last turns that fit; the first of them has its cue, whatever was dropped before it."""
    for first in range(len(rows)):
        turns = _shown(rows[first:], config.sticky)
        if sum(map(characters, turns)) <= config.max_characters:
            return turns
    raise DataError(
        f"Row {rows[-1].id!r} of {rows[-1].task} has {characters(rows[-1])} characters, more than "
        f"max_characters={config.max_characters}. Raise it, or lower turn_characters."
    )


def _shown(rows: list[Example], sticky: bool) -> list[Example]:
    """Turns as the user says them: without the cue that stands for their task."""
    turns: list[Example] = []
    standing: dict[str, str] = {}  # task -> the skill last asked of it
    for row in rows:
        stands = standing.get(row.task) == skill_of(row)
        turns.append(_bare(row) if sticky and stands and "bare" in row.meta else row)
        standing[row.task] = skill_of(row)
    return turns


def _bare(row: Example) -> Example:
    return replace(row, input=row.meta["bare"], instruction="", evidence=(), gold_evidence=())
