"""Tasks are loaded as their entry says, with rows of which none is on both sides."""

import json

import pytest

from bem.config import ConversationConfig, DataConfig, TaskConfig
from bem.errors import ConfigError, DataError
from bem.tasks.embedded import EMBEDDED
from bem.tasks.load import (
    TASKS,
    load_task,
    load_tasks,
    set_aside,
    training_mixture,
    validation_mixture,
)
from bem.tasks.public import PUBLIC
from bem.tasks.record import Family
from bem.training.data import Example


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def own(tmp_path, part, rows=5):
    lines = [
        {"id": f"{part}{i}", "input": f"{part} q{i}", "references": ["a"]} for i in range(rows)
    ]
    return write(tmp_path / f"{part}.jsonl", *lines)


def mine(tmp_path, **changes):
    files = {"train": own(tmp_path, "train"), "dev": own(tmp_path, "dev")}
    return TaskConfig(name="mine", **(files | changes))


def test_your_own_files_need_no_registration(tmp_path):
    task = load_task(mine(tmp_path, instruction="Say.", metric="chrf", max_new_tokens=7))
    assert (task.name, task.primary, task.max_new_tokens) == ("mine", "chrf", 7)
    assert task.dev[0].prompt == "Say.\ndev q0" and task.dev[0].task == "mine"
    assert "chrf" in task.metrics
    assert load_task(mine(tmp_path)).max_new_tokens == 64


def test_the_columns_of_your_own_files_are_honoured(tmp_path):
    def rows(part):
        return [
            {"q": f"{part} {i}", "answers": {"text": [i]}, "doc": i // 2, "input": "x"}
            for i in range(4)
        ]

    columns = {"input": "q", "references": "answers.text", "group": "doc"}
    files = {part: write(tmp_path / f"{part}.jsonl", *rows(part)) for part in ("train", "dev")}
    task = load_task(TaskConfig(name="mine", columns=columns, **files))
    assert [row.input for row in task.dev] == ["dev 0", "dev 1", "dev 2", "dev 3"]
    assert [row.references for row in task.train] == [("0",), ("1",), ("2",), ("3",)]
    assert [row.group for row in task.dev] == ["0", "0", "1", "1"]
    with pytest.raises(DataError, match=r"train\.jsonl:1: no column 'question' for 'input'"):
        load_task(TaskConfig(name="mine", columns={"input": "question"}, **files))


def test_rows_of_chat_trainers_need_no_columns(tmp_path):
    def rows(part):
        messages = [
            {"role": "user", "content": f"{part}?"},
            {"role": "assistant", "content": "yes"},
        ]
        return [{"messages": messages}, {"prompt": f"{part}: go", "completion": " on"}]

    files = {part: write(tmp_path / f"{part}.jsonl", *rows(part)) for part in ("train", "dev")}
    task = load_task(TaskConfig(name="mine", instruction="Say.", **files))
    assert [(row.prompt, row.answer) for row in task.dev] == [
        ("Say.\ndev?", "yes"),
        ("Say.\ndev: go", "on"),
    ]


def test_unanswerable_questions_are_rows_like_others(tmp_path):
    (tmp_path / "dev").mkdir()
    dev = write(tmp_path / "dev" / "x.jsonl", {"input": "who?", "references": []})
    task = load_task(mine(tmp_path, dev=dev))
    assert task.dev[0].references == () and task.dev[0].answer == ""
    data = DataConfig(tasks=[mine(tmp_path, dev=dev)], conversations=ConversationConfig(turns=1))
    assert load_tasks(data)[0].dev[0].references == ()


def test_two_files_of_one_name_are_told_apart(tmp_path):
    files = {
        part: write(tmp_path / part / "rows.jsonl", {"input": part, "references": ["a"]})
        for part in ("train", "dev")
    }
    task = load_task(TaskConfig(name="mine", **files))
    assert (task.train[0].id, task.dev[0].id) == ("train-rows-1", "dev-rows-1")


def test_a_row_may_name_its_form_but_not_an_unknown_one(tmp_path):
    row = {"input": "q", "references": ["a"], "meta": {"form": "poem"}}
    dev = write(tmp_path / "own.jsonl", row)
    with pytest.raises(DataError, match=r"row 'own-1' has the unknown form 'poem'\. Known: text"):
        load_task(mine(tmp_path, dev=dev))
    for meta in ({"form": ["json"]}, {"ask": 3}, {"bare": None}):
        dev = write(tmp_path / "own.jsonl", {**row, "meta": meta})
        with pytest.raises(DataError, match=r"row 'own-1'"):
            load_task(mine(tmp_path, dev=dev))


def test_unknown_names_are_met_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"No task 'sig2jsn'\. Did you mean 'sig2json'\?"):
        load_task("sig2jsn")
    with pytest.raises(ConfigError, match=r"Known: doc2name.*needs `train` and `dev`"):
        load_task("zzzzzz")
    with pytest.raises(ConfigError, match=r"unknown metric rouge\. Known: em"):
        load_task(TaskConfig(name="sig2json", metrics=["em", "rouge"]))
    with pytest.raises(DataError, match="'mine' has no dev rows"):
        load_task(TaskConfig(name="mine", train=own(tmp_path, "train")))


def test_fewer_rows_are_a_seeded_choice_in_the_same_order(tmp_path):
    whole = load_task("sig2json")
    few = load_task("sig2json", train_rows=50, dev_rows=20, seed=1)
    ids = [row.id for row in whole.dev]
    places = [ids.index(row.id) for row in few.dev]
    assert len(few.train) == 50 and len(places) == 20 and places == sorted(places)
    again = load_task("sig2json", train_rows=50, dev_rows=20, seed=1)
    other = load_task("sig2json", train_rows=50, dev_rows=20, seed=2)
    assert few == again != other


def test_several_tasks_make_one_mixture_with_ids_of_their_own():
    data = DataConfig(tasks=["sig2json", "sig2doc"], train_rows=30, dev_rows=5)
    tasks = load_tasks(data)
    rows = training_mixture(tasks)
    assert [task.name for task in tasks] == ["sig2json", "sig2doc"] and len(rows) == 60
    assert len({row.id for row in rows}) == 60
    assert {row.task for row in rows} == {"sig2json", "sig2doc"}


def test_the_registry_names_every_family_once():
    assert set(TASKS) == set(EMBEDDED) | set(PUBLIC) and not set(EMBEDDED) & set(PUBLIC)
    assert all(isinstance(family, Family) for family in TASKS.values())


# ------------------------------------------------------------ rows set aside


def rows_in_groups(n, size):
    return [Example(f"r{i}", "q", ("a",), group=f"g{i // size}") for i in range(n)]


def test_rows_are_set_aside_with_their_groups_and_the_seed_decides():
    rows = rows_in_groups(30, 3)
    rest, aside = set_aside(rows, 7, 0, "t")
    assert len(aside) == 7
    assert not {row.group for row in rest} & {row.group for row in aside}
    assert len(rest) == 30 - 9  # three whole groups are gone; what is beyond seven is used nowhere
    assert set_aside(rows, 7, 0, "t") == (rest, aside)
    assert set_aside(rows, 7, 1, "t")[1] != aside
    assert set_aside(rows, None, 0, "t") == (rows, [])


def test_setting_everything_aside_is_refused_with_numbers():
    with pytest.raises(DataError, match=r"setting 4 of 6 training rows aside.*leaves 0"):
        set_aside(rows_in_groups(6, 6), 4, 0, "t")


def test_validation_rows_are_no_training_rows_even_as_earlier_turns():
    data = DataConfig(
        tasks=["sig2json", "doc2name"], train_rows=40, validation_rows=6, dev_rows=4,
        conversations={"turns": 3},
    )  # fmt: skip
    tasks = load_tasks(data)
    aside = {row.answer for task in tasks for row in task.validation}
    assert [len(task.validation) for task in tasks] == [6, 6]
    assert len(aside) > 6
    for task in tasks:
        for row in task.train:
            assert row.answer not in aside
            assert not aside & {answer for _, answer in row.history}
    assert all(row.history for task in tasks for row in task.validation)
    assert [row.id.split("/")[0] for row in validation_mixture(tasks)] == ["sig2json"] * 6 + [
        "doc2name"
    ] * 6


def test_own_held_out_rows_of_a_named_task_need_nothing_else(tmp_path):
    """A public task's name lends its form and metrics; its own files are not looked for."""
    entry = TaskConfig(name="json_snips", dev=own(tmp_path, "dev"))
    task = load_task(entry, need_train=False)
    assert (len(task.dev), task.train, task.form) == (5, [], TASKS["json_snips"].form)
