"""Every skill has exactly one expert, and a conversation's route follows from its skills."""

import pytest

from bem.config import RoutingConfig
from bem.errors import ConfigError
from bem.experiments.routing.skills import Skills, routed, skills_of, unrouted
from bem.tasks.load import Task
from bem.training.data import Example


def task(name, asks=()):
    rows = [
        Example(f"r{a}", "x", ("y",), meta={"ask": a} if a else {}, task=name)
        for a in asks or ("",)
    ]
    by = ("ask",) if asks else ()
    return Task(name, rows, rows, ("em",), "em", max_new_tokens=2, slice_by=by)


TASKS = [task("forms", ("json", "kind")), task("qa")]


def test_without_a_list_of_experts_each_skill_has_its_own():
    skills = skills_of(RoutingConfig(), TASKS)
    assert len(skills.experts) == len(skills.owner) == len(set(skills.owner.values()))
    assert all("/" not in name for name in skills.experts)


def test_an_expert_may_serve_a_whole_task():
    skills = skills_of(RoutingConfig(experts={"all": ["forms"], "qa": ["qa"]}), TASKS)
    assert {owner for skill, owner in skills.owner.items() if skill.startswith("forms")} == {1}
    assert skills.owner["qa"] == 2


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"a": ["forms"], "b": ["forms"], "c": ["qa"]}, "belongs to two experts"),
        ({"a": ["forms"]}, "nobody serves qa"),
        ({"a": ["forms", "sql"], "b": ["qa"]}, r"routing\.experts\.a: no skill 'sql'"),
    ],
)
def test_a_list_that_is_not_one_to_one_is_refused(experts, message):
    with pytest.raises(ConfigError, match=message):
        skills_of(RoutingConfig(experts=experts), TASKS)


def test_what_was_saved_may_serve_skills_that_no_row_asks_for():
    experts = {"j": ["forms/json"], "s": ["sql"], "k": ["forms/kind"], "q": ["qa"]}
    skills = skills_of(RoutingConfig(experts=experts, checkpoint="saved"), TASKS)
    assert skills.experts == ("j", "s", "k", "q")  # in the order in which they were saved
    assert skills.owner == {"forms/json": 1, "forms/kind": 3, "qa": 4}


def test_a_skill_of_an_earlier_turn_is_one_too():
    talk = Example("t", "x", ("y",), task="qa", meta={"skills": ["sql", "forms/last", "qa"]})
    tasks = [*TASKS, Task("qa", [], [talk], ("em",), "em", max_new_tokens=2)]
    skills = skills_of(RoutingConfig(), tasks)
    assert list(skills.owner) == ["forms/json", "forms/kind", "forms/last", "qa", "sql"]
    assert len(skills.route(talk)) == 3


def test_a_row_is_routed_turn_by_turn_and_unrouted_again():
    skills = skills_of(RoutingConfig(experts={"f": ["forms"], "q": ["qa"]}), TASKS)
    row = Example("r", "x", ("y",), task="qa", meta={"skills": ["qa", "qa"]})
    assert skills.route(row) == [2, 2]
    (with_route,) = routed([row], [[2, 1]])
    assert with_route.meta["route"] == [2, 1] and unrouted(with_route).meta["route"] is None


def test_a_labelled_row_names_the_expert_of_every_turn_and_holds_no_answer():
    skills = Skills(("a", "b"), {"x": 1, "y": 2})
    row = Example("1", "ask", ("answer",), task="x", meta={"skills": ["y", "x"], "kept": 1})
    found = skills.labelled(row)
    assert found.meta == {"skills": ["y", "x"], "kept": 1, "label": ["b", "a"]}
    assert found.references == () and found.input == row.input
