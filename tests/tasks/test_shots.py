"""A few-shot row: examples of its own skill, from training rows of other groups, before what it was."""

import pytest

from bem.config import ConversationConfig
from bem.errors import DataError
from bem.tasks.conversations import into_conversations, skill_of
from bem.tasks.load import Task
from bem.tasks.shots import with_shots
from bem.training.data import Example


def row(i, task, ask="", group="", note=""):
    meta = {"ask": ask, "bare": f"say {i}"} if ask else {}
    text = f"{task} {ask}: say {i}{note}"
    return Example(
        f"{task}{ask}{i}", text, (f"{task} {ask} {i}",), group=group, task=task, meta=meta
    )


def task(name, asks=("",), n=12, held_out=6):
    sides = [
        [row(i, name, ask, f"{name}{i // 2}") for i in range(first, first + k) for ask in asks]
        for first, k in ((0, n), (100, held_out))
    ]
    return Task(name, *sides, ("em", "loss"), "em", max_new_tokens=2)


TASKS = [task("forms", ("json", "kind")), task("qa")]


def test_each_row_stands_behind_examples_of_its_own_skill_and_of_other_groups():
    known = {(r.prompt, r.answer): r for t in TASKS for r in t.train}
    for before, after in zip(TASKS, with_shots(TASKS, 3, 0), strict=True):
        assert after.train == before.train
        for old, new in zip(before.dev, after.dev, strict=True):
            shown = [known[turn] for turn in new.history]
            assert [skill_of(r) for r in shown] == [skill_of(old)] * 3
            assert len({r.group for r in shown}) == 3
            assert (new.id, new.prompt, new.references) == (old.id, old.prompt, old.references)


def test_examples_stand_before_a_row_s_own_history_with_their_cue_shown():
    talks = into_conversations(TASKS, ConversationConfig(turns=3))
    assert any(r.meta["sticky"] for t in talks for r in t.train)
    raw = {(r.prompt, r.answer): skill_of(r) for t in TASKS for r in t.train}
    for before, after in zip(talks, with_shots(talks, 2, 0), strict=True):
        for old, new in zip(before.dev, after.dev, strict=True):
            assert new.history[2:] == old.history
            skills = [raw[turn] for turn in new.history[:2]]  # as the rows were before: cue and all
            assert skills == [skill_of(old)] * 2
            assert new.meta["skills"] == [*skills, *old.meta["skills"]]


def test_the_seed_decides_and_nothing_else():
    one, again, other = (with_shots(TASKS, 2, seed) for seed in (0, 0, 1))
    alone = with_shots([TASKS[0], task("qa", held_out=2)], 2, 0)
    assert one == again != other
    assert alone[1].dev == one[1].dev[:2]


def test_a_row_s_own_group_is_never_shown():
    qa = task("qa", held_out=0)
    own = Task("qa", qa.train, [row(5, "qa", group="qa2")], ("em",), "em", max_new_tokens=2)
    for seed in range(20):
        (shown,) = with_shots([own], 5, seed)[0].dev
        assert {answer for _, answer in shown.history}.isdisjoint({"qa  4", "qa  5"})


def test_the_shortest_of_a_few_is_shown():
    long = [row(i, "qa", group=f"g{i}", note=" at length" * 9) for i in range(3)]
    rows = [*long, row(3, "qa", group="g3")]
    qa = Task("qa", rows, [row(9, "qa")], ("em",), "em", max_new_tokens=2)
    assert with_shots([qa], 1, 0)[0].dev[0].history == ((rows[3].prompt, rows[3].answer),)


def test_worse_evidence_is_asked_behind_the_same_examples():
    qa = task("qa")
    swapped = Task(**{**vars(qa), "variants": {"off": [row(100, "qa", note=" again")] * 2}})
    (shown,) = with_shots([swapped], 2, 0)
    assert [r.history for r in shown.variants["off"]] == [shown.dev[0].history] * 2


def test_no_shots_leave_the_tasks_as_they_are_and_too_many_name_both_numbers():
    assert with_shots(TASKS, 0, 0) == TASKS
    with pytest.raises(
        DataError, match=r"'qa100': 7 shots of qa need .* there are 6\. Lower shots"
    ):
        with_shots([TASKS[1]], 7, 0)
    hidden = [Example("s", "say", ("x",), task="qa", meta={"sticky": True})]
    qa = Task("qa", hidden, [row(9, "qa")], ("em",), "em", max_new_tokens=2)
    with pytest.raises(DataError, match="there are 0"):
        with_shots([qa], 1, 0)
