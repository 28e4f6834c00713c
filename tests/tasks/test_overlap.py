"""What was trained on is not held out."""

import json

import pytest

from bem.config import DataConfig, TaskConfig
from bem.errors import DataError
from bem.tasks.load import load_task, load_tasks


def rows(part, n=4, **changes):
    return [
        {"id": f"{part}{i}", "input": f"{part} {i}", "references": [f"a{i}"], **changes}
        for i in range(n)
    ]


def entry(folder, train, dev, name="mine", **changes):
    files = {}
    for part, lines in (("train", train), ("dev", dev)):
        path = folder / f"{name}.{part}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        files[part] = str(path)
    return TaskConfig(name=name, **(files | changes))


def test_sides_without_a_common_row_are_loaded(tmp_path):
    task = load_task(entry(tmp_path, rows("train"), rows("dev")))
    assert (len(task.train), len(task.dev)) == (4, 4)


def test_one_file_for_both_sides_is_refused_with_the_counts(tmp_path):
    both = entry(tmp_path, rows("x"), rows("x"))
    counts = "of 4 held-out rows 4 have the id of a training row and 4 its input"
    with pytest.raises(DataError, match=f"Task 'mine': {counts}"):
        load_task(both)
    with pytest.raises(DataError, match=counts):
        load_task(TaskConfig(name="mine", train=both.train, dev=both.train))
    with pytest.raises(DataError, match=counts):  # also where nothing is trained
        load_task(both, need_train=False)
    with pytest.raises(DataError, match=counts):  # and where only some of the rows would be taken
        load_task(both, train_rows=1, dev_rows=1)


def test_equal_ids_and_equal_inputs_are_counted_apart(tmp_path):
    train = rows("train")
    same_id = {**rows("dev")[0], "id": "train0"}
    same_input = {**rows("dev")[1], "input": " train  2\n"}
    with pytest.raises(
        DataError, match=r"of 4 held-out rows 1 have the id .* and 1 its input, as row 'dev1'"
    ):
        load_task(entry(tmp_path, train, [same_id, same_input, *rows("dev")[2:]]))


def test_an_input_is_all_that_the_model_reads(tmp_path):
    one = {"input": "who?", "references": ["a"]}
    others = [
        {**one, "evidence": ["p"]},
        {**one, "history": [["u", "v"]]},
        {**one, "instruction": "Say."},
        {**one, "system": "s"},
        {**one, "input": "Who?"},
    ]
    assert len(load_task(entry(tmp_path, [one], others)).dev) == 5
    with pytest.raises(DataError, match="0 have the id of a training row and 1 its input"):
        load_task(entry(tmp_path, others, [{**others[1], "references": ["b"]}]))


def test_rows_without_ids_share_none(tmp_path):
    train = [{"input": f"t{i}", "references": ["a"]} for i in range(3)]
    dev = [{"input": f"d{i}", "references": ["a"]} for i in range(3)]
    assert len(load_task(entry(tmp_path, train, dev)).dev) == 3


def test_a_row_held_out_of_one_task_is_not_trained_on_in_another(tmp_path):
    one = entry(tmp_path, rows("x"), rows("y"), name="one")
    other = entry(tmp_path, rows("z"), [*rows("v"), rows("x")[1]], name="other")
    with pytest.raises(
        DataError, match=r"1 of 5 held-out rows of task 'other' are training rows of 'one'"
    ):
        load_tasks(DataConfig(tasks=[one, other]))
    assert (
        len(load_tasks(DataConfig(tasks=[one, entry(tmp_path, rows("z"), rows("v"), name="o")])))
        == 2
    )


def test_a_dataset_with_one_split_for_both_sides_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows("x")).to_parquet(str(tmp_path / "train.parquet"))
    splits = {"train": "train", "dev": "train"}
    with pytest.raises(DataError, match=r"of 4 held-out rows 4 have the id .* and 4 its input"):
        load_task(TaskConfig(name="mine", hf_dataset=str(tmp_path), hf_splits=splits))
