"""Which expert serves which skill of the tasks, and the routes that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bem.config import RoutingConfig
from bem.errors import ConfigError
from bem.tasks.conversations import skill_of, skills
from bem.tasks.load import Task
from bem.training.data import Example

Options = list[list[int]]
"""Expert option of each turn of each row; 0 is the bare base."""


@dataclass(frozen=True)
class Skills:
    """Which expert serves which skill."""

    experts: tuple[str, ...]
    owner: dict[str, int]
    """Skill -> expert option, from 1."""

    def route(self, row: Example) -> list[int]:
        """Expert option of each turn of a row by the skills that its maker gave them."""
        turns = row.meta.get("skills") or [skill_of(row)]
        return [self.owner[skill] for skill in turns]

    def labelled(self, row: Example) -> Example:
        """The row with those experts as its labels, and without the answer, which nothing is learned from."""
        names = [self.experts[option - 1] for option in self.route(row)]
        return replace(row, references=(), meta={**row.meta, "label": names})


def skills_of(routing: RoutingConfig, tasks: Sequence[Task]) -> Skills:
    """The experts of a config over the tasks' skills.

    Raises:
        ConfigError: an expert of an unknown skill, or a skill with no expert or with two.
    """
    present = skills(tasks)
    experts = routing.experts or {skill.replace("/", "-"): [skill] for skill in present}
    owner: dict[str, int] = {}
    for option, (expert, names) in enumerate(experts.items(), 1):
        for name in names:
            served = [s for s in present if s == name or s.startswith(name + "/")]
            if (
                not served and routing.checkpoint is None
            ):  # what is saved serves more than these rows
                raise ConfigError(
                    f"routing.experts.{expert}: no skill {name!r}. Skills: {', '.join(present)}."
                )
            if twice := [skill for skill in served if skill in owner]:
                raise ConfigError(f"routing.experts: {twice[0]} belongs to two experts.")
            owner |= dict.fromkeys(served, option)
    if missing := [skill for skill in present if skill not in owner]:
        raise ConfigError(f"routing.experts: nobody serves {', '.join(missing)}.")
    return Skills(tuple(experts), owner)


def routed(rows: Sequence[Example], options: Sequence[Sequence[int]]) -> list[Example]:
    """The rows with a route: one expert option for each turn."""
    return [
        replace(row, meta={**row.meta, "route": list(o)})
        for row, o in zip(rows, options, strict=True)
    ]


def unrouted(row: Example) -> Example:
    """The row without a route: whatever router there is decides."""
    return replace(row, meta={**row.meta, "route": None})
