"""A run's folder belongs to one config, and its lines are read whatever they hold."""

import json

import pytest

from bem.errors import CheckpointError, ConfigError, DataError
from bem.files import write_json
from bem.runs.folder import RunFolder, checkpoint_kind, read_jsonl, written
from tests.experiments.finished_run import make_config

INPUTS = {"data": {"forms": "0" * 64}, "base": "1" * 64}


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_a_line_ends_at_a_newline_alone(tmp_path, character):
    path = tmp_path / "predictions.jsonl"
    rows = [{"prediction": f"a{character}b"}, {"prediction": "c"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    assert read_jsonl(path) == rows


def test_rows_that_a_run_did_not_write_are_none_and_broken_ones_are_named(tmp_path):
    assert read_jsonl(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not JSON"):
        read_jsonl(tmp_path / "metrics.jsonl")


def test_a_folder_is_claimed_by_one_config_with_one_set_of_inputs(tmp_path):
    config, folder = make_config(tmp_path), RunFolder(tmp_path / "finished")
    folder.claim(config, INPUTS)
    folder.claim(config.model_copy(update={"workers": 7}), INPUTS)  # says where, not what
    assert folder.config == config
    with pytest.raises(ConfigError, match=r"seeds: \[0, 1\] -> \[0\]"):
        folder.claim(config.model_copy(update={"seeds": [0]}), INPUTS)
    with pytest.raises(ConfigError, match=r"base_sha256: 1+ -> 2+"):
        folder.claim(config, {**INPUTS, "base": "2" * 64})


def test_no_run_takes_the_place_of_the_version_store(tmp_path):
    with pytest.raises(ConfigError, match="a run cannot be called 'store'"):
        RunFolder(tmp_path / "store").claim(make_config(tmp_path, name="store"), INPUTS)


def test_a_second_command_on_a_folder_is_refused_while_the_first_works(tmp_path):
    folder = RunFolder(tmp_path / "run")
    refused = pytest.raises(ConfigError, match="Another command is working on")
    with folder.lock(), refused, folder.lock():
        pass
    with folder.lock():
        pass


def test_a_cell_is_finished_under_one_key_alone_and_while_its_results_are_there(tmp_path):
    cell = RunFolder(tmp_path).cell("s0", 0)
    assert not cell.is_finished("key")
    cell.finish("key")
    assert not cell.is_finished("key")
    for path in (cell.measurement, cell.predictions):
        path.write_text("{}")
    assert cell.is_finished("key") and not cell.is_finished("other")
    for broken in ('{"key": "k', "", "[]", '{"a": 1}', "null"):
        (cell.path / "cell.json").write_text(broken)
        assert not cell.is_finished("key")  # so that `bem run` makes it again


def test_a_damaged_record_of_a_run_is_a_readable_error(tmp_path):
    config, folder = make_config(tmp_path), RunFolder(tmp_path / "finished")
    folder.claim(config, INPUTS)
    (folder.path / "environment.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=r"base_sha256: None -> 1+"):
        folder.claim(config, INPUTS)
    for broken in (b"name: [", b"\xff\xfe", b"- 1", b""):
        (folder.path / "config.yaml").write_bytes(broken)
        with pytest.raises(ConfigError, match=r"config\.yaml"):
            _ = folder.config


def test_a_missing_file_says_how_to_go_on(tmp_path):
    with pytest.raises(CheckpointError, match=r"No latency\.json in .*`bem run` resumes it"):
        written(tmp_path / "latency.json")
    with pytest.raises(CheckpointError, match="is no run"):
        _ = RunFolder(tmp_path).config


@pytest.mark.parametrize(
    ("manifest", "kind"),
    [
        ({"kind": "router"}, "router"),
        ({"kind": "peer"}, "peer"),
        ({"extra": {"note": '"kind": "router"'}}, "adapter"),
        (None, "adapter"),
    ],
)
def test_a_checkpoint_is_what_its_manifest_says(tmp_path, manifest, kind):
    if manifest is not None:
        write_json(tmp_path / "manifest.json", manifest)
    assert checkpoint_kind(tmp_path) == kind


def test_a_manifest_that_is_none_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="must be a JSON object"):
        checkpoint_kind(tmp_path)
