"""What is wrong with a config is said in the reader's words: place, key, and what was meant."""

import pytest
import yaml

from bem.config import DataConfig, ExperimentConfig, TaskConfig, load, parse
from bem.errors import ConfigError

VALUES = {
    "name": "small",
    "data": {"tasks": ["sig2json", {"name": "mine", "train": "a.jsonl", "dev": "b.jsonl"}]},
    "arms": [
        {"name": "s0", "role": "baseline"},
        {"name": "v1.5", "adapters": {"variant": "v1"}},
    ],
    "seeds": [0, 1],
    "routing": None,
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


def message(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "end"),
    [
        ("steps=3", "unknown key 'steps'. Did you mean 'training.steps' or"),
        ("rank=3", "unknown key 'rank'. Did you mean 'adapters.rank'"),
        ("max_new_tokens=3", "unknown key 'max_new_tokens'. Did you mean 'data.tasks.NAME.max_new_tokens'"),
        ("training.rank=3", "unknown key 'training.rank'. Did you mean 'adapters.rank'"),
        ("training.stesp=3", "unknown key 'training.stesp'. Did you mean 'steps'?"),
        ("trainin.steps=3", "unknown key 'trainin'. Did you mean 'training'?"),
        ("data.tasks.1.max_tokens=3",
         "data.tasks[1] (mine): unknown key 'max_tokens'. Did you mean 'max_new_tokens'?"),
        ("data.tasks.mine.metrik=em",
         "data.tasks[1] (mine): unknown key 'metrik'. Did you mean 'metric'?"),
        ("data.tasks.sig2json.metrik=em",
         "data.tasks[0] (sig2json): unknown key 'metrik'. Did you mean 'metric'?"),
        ("data.tasks.mine.retrieval.shwn=3",
         "data.tasks[1] (mine): retrieval: unknown key 'shwn'. Did you mean 'shown'?"),
        ("data.tasks.mine.max_new_tokens=0", "data.tasks[1] (mine): max_new_tokens: Input should be greater"),
        ("data.tasks.mine.max_new_tokens=many", "data.tasks[1] (mine): max_new_tokens: Input should be a"),
        ("data.tasks.0=5", "data.tasks[0]: Input should be a valid string (got 5)"),
        ("data.tasks.0={metric: em}", "data.tasks[0].name: Field required"),
        ("arms.1.rol=control", "arms[1] (v1.5): unknown key 'rol'. Did you mean 'role'?"),
        ("zzzzzzzz=1", "unknown key 'zzzzzzzz'."),
    ],
)  # fmt: skip
def test_a_typo_is_named_with_its_place_and_what_was_meant(path, change, end):
    lines = message(path, change).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{path} with {change}: ") and end in lines[0]
    assert "Tag" not in lines[0] and ".entry" not in lines[0]  # pydantic's words


def test_overrides_reach_entries_of_lists_by_place_and_by_name(path):
    config = load(
        path,
        ["data.tasks.0.max_new_tokens=16", "data.tasks.mine.metric=f1", "seeds.1=7", "training.steps=3",
         "arms.v1.5.adapters.rank=4", "arms.1.match=none", "routing.expert_rank=2"],
    )  # fmt: skip
    first, second = config.data.tasks
    assert isinstance(first, TaskConfig) and isinstance(second, TaskConfig)
    assert (first.name, first.max_new_tokens, second.metric) == ("sig2json", 16, "f1")
    assert config.seeds == [0, 7] and config.training.steps == 3
    assert (
        config.arms[1].adapters == {"variant": "v1", "rank": 4} and config.arms[1].match == "none"
    )
    assert config.routing is not None and config.routing.expert_rank == 2
    assert load(path, ["data.tasks.1=sig2doc"]).data.tasks == ["sig2json", "sig2doc"]


@pytest.mark.parametrize(
    ("change", "end"),
    [
        ("data.tasks.2.metric=f1", "'data.tasks' has no entry '2'. Entries: 0 sig2json, 1 mine."),
        ("data.tasks.-1.metric=f1", "'data.tasks' has no entry '-1'. Entries: 0 sig2json, 1 mine."),
        ("data.tasks.mien.metric=f1", "'data.tasks' has no entry 'mien'. Did you mean 'mine'?"),
        ("data.tasks.0.metric.x=f1", "'data.tasks.0.metric' is"),
        ("name.x=1", "'name' is 'small', not a section."),
        ("seeds.0.x=1", "'seeds.0' is 0, not a section."),
        ("training.steps", "must look like section.key=value"),
        ("=3", "must look like section.key=value"),
        ("training..steps=3", "must look like section.key=value"),
        ("training.steps=[", "the value is not valid YAML"),
    ],
)
def test_an_override_that_leads_nowhere_says_where_it_ended(path, change, end):
    changes = ["data.tasks.0.metric=f1", change] if ".metric.x" in change else [change]
    assert message(path, *changes).startswith(f"Override {change!r}: ") or "must look" in end
    assert end in message(path, *changes)


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ({"name": "sig2json", "columns": {"input": "q"}}, "`columns` need rows of your own"),
        ({"name": "mine", "train": "a", "dev": "b", "hf_config": "x"}, "need an `hf_dataset`"),
        ({"name": "mine", "train": "a", "dev": "b", "hf_splits": {"train": "x"}}, "need an `hf_d"),
        ({"name": "mine", "train": "a", "dev": "b", "hf_dataset": "x"}, "not both"),
        ({"name": "mine", "hf_dataset": "x", "hf_splits": {"test": "x"}}, "hf_splits"),
        ({"name": "../evil"}, "name: String should match pattern"),
        ({"name": "a/b"}, "name: String should match pattern"),
        ({"name": ""}, "name: String should have at least 1 character"),
    ],
)
def test_a_task_entry_that_cannot_be_honoured_is_refused(task, problem):
    with pytest.raises(ConfigError) as caught:
        parse(DataConfig, {"tasks": [task]}, "data")
    assert problem in str(caught.value) and str(caught.value).startswith("data: tasks[0]")


def test_a_task_that_says_nothing_of_its_length_keeps_its_own_through_a_stored_config(path):
    config = load(path, ["data.tasks.0.metric=f1"])
    again = parse(ExperimentConfig, config.model_dump(mode="json"), "stored")
    assert again == config and again.data.tasks[0].max_new_tokens is None  # pyright: ignore


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seeds=[-1]", "seeds[0]: Input should be greater than or equal to 0"),
        ("seeds=[99999999999999999999]", "seeds: must be a finite number, at most 1e+12"),
        ("seeds=[3, 3]", "seeds [3, 3]: each one counts once"),
        ("data.seed=-2", "data.seed: Input should be greater than or equal to 0"),
        ("training.learning_rate=.inf", "training.learning_rate: must be a finite number"),
        ("training.clip=1e300", "training.clip: must be a finite number"),
        ("training.steps=10000000000000", "training.steps: must be a finite number"),
        ("adapters.alpha=1e300", "alpha: must be a finite number"),
        ("adapters.chunk_size=1000000000000000000000", "chunk_size: must be a finite number"),
        ("adapters.rank=100000000", "rank: Input should be less than or equal to 65536"),
        ("adapters.k_active=9", "k_active 9 exceeds the rank 8"),
    ],
)
def test_numbers_with_which_nothing_can_be_computed_are_refused_before_anything_runs(
    path, change, said
):
    assert said in message(path, change)
