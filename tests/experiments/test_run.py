"""A run trains every cell once, resumes what was killed, and refuses to mix two experiments."""

import json
from pathlib import Path

import numpy as np
import pytest

from bem.config import ExperimentConfig
from bem.errors import ConfigError
from bem.experiments.events import Event
from bem.experiments.run import run
from bem.files import read_json
from bem.runs import verdicts as judging
from bem.runs.folder import RunFolder, read_jsonl


def write_rows(path: Path, word: str = "yes") -> Path:
    """Training rows there, and held-out ones beside them."""
    for file, first in ((path, 0), (path.with_name("held_out.jsonl"), 12)):
        rows = [
            {"input": f"say {answer} {i}", "references": [answer], "group": f"doc{i // 2}"}
            for i in range(first, first + 12)
            for answer in (word, "no")
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(folder: Path, base: Path, **changes) -> ExperimentConfig:
    train, dev = str(folder / "rows.jsonl"), str(folder / "held_out.jsonl")
    task = {"name": "mine", "train": train, "dev": dev, "max_new_tokens": 3}
    values = {
        "name": "small",
        "output": str(folder / "runs"),
        "base": str(base),
        "seeds": [0, 1],
        "data": {"tasks": [task]},
        "adapters": {"rank": 2},
        "arms": [
            {"name": "s0", "role": "baseline"},
            {"name": "v4", "adapters": {"variant": "v4"}, "match": "none"},
            {"name": "s0-again", "adapters": {"variant": "s0"}, "role": "control"},
        ],
        "training": {"steps": 4, "batch_size": 4, "max_length": 64, "checkpoint_every": 3},
        "gates": {"n_bootstrap": 200},
        "latency_rounds": 2,
    }
    return ExperimentConfig.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="module")
def finished(home, micro_base):
    """(config, result, events) of one whole run."""
    config, events = make_config(home, micro_base), []
    return config, run(config, events.append, command="bem run small.yaml"), events


def test_a_run_leaves_everything_that_the_store_promises(finished):
    config, result, _ = finished
    folder = RunFolder(result.folder)
    for arm in config.arms:
        for seed in config.seeds:
            cell = folder.cell(arm.name, seed)
            assert (cell.checkpoint / "manifest.json").is_file()
            assert len(read_jsonl(cell.metrics)) == config.training.steps
            assert len(read_jsonl(cell.predictions)) == 24
            assert cell.measurement.is_file()
            assert not (cell.path / "state.pt").exists()
    assert list(result.verdicts) == ["v4"]
    assert list(read_json(folder.verdicts)["controls"]) == ["s0-again"]
    described = read_json(folder.path / "environment.json")
    assert described["command"] == "bem run small.yaml" and described["seeds"] == [0, 1]
    assert result.report.is_file() and folder.config == config


def test_the_same_arm_twice_comes_out_the_same(finished):
    config, result, _ = finished
    folder = RunFolder(result.folder)
    for seed in config.seeds:
        one, other = folder.cell("s0", seed), folder.cell("s0-again", seed)
        assert one.predictions.read_bytes() == other.predictions.read_bytes()
        losses = [[row["loss"] for row in read_jsonl(c.metrics)] for c in (one, other)]
        assert losses[0] == losses[1]


def test_all_arms_see_the_same_examples_and_seeds_see_others(finished):
    config, result, _ = finished
    folder = RunFolder(result.folder)
    tokens = {
        (arm.name, seed): [r["tokens"] for r in read_jsonl(folder.cell(arm.name, seed).metrics)]
        for arm in config.arms
        for seed in config.seeds
    }
    assert tokens["s0", 0] == tokens["v4", 0] and tokens["s0", 1] == tokens["v4", 1]
    assert folder.cell("s0", 0).metrics.read_bytes() != folder.cell("s0", 1).metrics.read_bytes()


def test_the_events_tell_what_is_going_on(finished):
    _, _, events = finished
    steps = [e for e in events if e.stage == "training" and (e.arm, e.seed) == ("v4", 1)]
    assert [e.done for e in steps] == [1, 2, 3, 4] and steps[0].total == 4
    assert "tokens/s" in steps[0].detail
    assert [e.cell for e in events if e.stage == "done"] == [1, 2, 3, 4, 5, 6]
    assert "left" in next(e.detail for e in events if e.stage == "done")


def test_running_again_skips_every_cell_and_says_the_same(finished):
    config, result, _ = finished
    before = {p: p.read_bytes() for p in result.folder.rglob("*") if p.is_file()}
    events: list[Event] = []
    again = run(config, events.append, command="bem run small.yaml")
    assert sum(e.stage.startswith("finished before") for e in events) == 6
    assert not any(e.stage in ("training", "measuring", "timing") for e in events)
    assert again.verdicts.keys() == result.verdicts.keys()
    after = {p: p.read_bytes() for p in result.folder.rglob("*") if p.is_file()}
    assert before == after


@pytest.mark.parametrize("stage", ["training", "measuring", "timing"])
def test_a_killed_run_resumes_with_the_same_result(finished, micro_base, tmp_path, stage):
    config, result, _ = finished
    write_rows(tmp_path / "rows.jsonl")
    config = make_config(tmp_path, micro_base)

    def kill(event: Event) -> None:
        if event.stage == stage and event.done == 2 and (event.arm == "v4" or stage == "timing"):
            raise KeyboardInterrupt

    def kill_measuring(event: Event) -> None:
        if event.stage == "measuring" and event.arm == "v4":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, kill_measuring if stage == "measuring" else kill)
    resumed = run(config)
    for seed in config.seeds:
        old = RunFolder(result.folder).cell("v4", seed)
        new = RunFolder(resumed.folder).cell("v4", seed)
        assert old.predictions.read_bytes() == new.predictions.read_bytes()
        for a, b in zip(read_jsonl(old.metrics), read_jsonl(new.metrics), strict=True):
            assert a["loss"] == b["loss"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": [0, 2]}, "seeds: [0, 1] -> [0, 2]"),
        ({"latency_rounds": 3}, "latency_rounds: 2 -> 3"),
        ({"gates": {"n_bootstrap": 200, "alpha": 0.2}}, "gates.alpha: 0.05 -> 0.2"),
    ],
)
def test_another_config_of_the_same_name_is_refused(finished, home, micro_base, changes, said):
    with pytest.raises(ConfigError) as refused:
        run(make_config(home, micro_base, **changes))
    assert said in str(refused.value) and "--name small-2" in str(refused.value)


def test_other_data_under_the_same_name_is_refused(finished, home, micro_base):
    write_rows(home / "rows.jsonl", word="maybe")
    try:
        with pytest.raises(ConfigError, match=r"data\.sha256\.train"):
            run(make_config(home, micro_base))
    finally:
        write_rows(home / "rows.jsonl")


def test_where_a_run_lies_may_change(finished, home, micro_base):
    config, result, _ = finished
    assert run(config.model_copy(update={"threads": 1})).folder == result.folder


def test_two_commands_on_one_run_are_refused(finished):
    config, result, _ = finished
    with (
        RunFolder(result.folder).lock(),
        pytest.raises(ConfigError, match="Another command is working on"),
    ):
        run(config)


def test_seeds_are_stacked_and_must_be_of_the_same_examples(finished):
    config, result, _ = finished
    measured = judging.measurements(RunFolder(result.folder), config)["s0"]
    assert np.shape(measured.metrics["em"]) == (2, 24)
    assert len(measured.kv_hits) == 24  # type: ignore[arg-type]
    assert set(measured.latency_ms) == {"prefill", "decode"} and measured.memory_bytes
