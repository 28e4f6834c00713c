"""A release is what its run was: rounded weights, held-out rows, a card that states the verdict; opened by folder or name."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bem
from bem.config import ExperimentConfig, parse
from bem.errors import CheckpointError, ConfigError
from bem.experiments.demos import of_release
from bem.experiments.run import run
from bem.files import read_json
from bem.releases.named import RELEASES, Shipped, router_of, static_of
from bem.runs.folder import RunFolder
from bem.runs.promotion import import_release
from bem.runs.store import Store
from bem.tasks.load import load_tasks

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_release.py"
ROWS = 3
TASKS = [
    {"name": "forms", "metric": "f1", "max_new_tokens": 4},
    {"name": "sig2json", "metric": "f1", "max_new_tokens": 4},
]


def make_release(*arguments):
    spec = importlib.util.spec_from_file_location("make_release", SCRIPT)
    module = sys.modules["make_release"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A real run, as short as one can be, whose experts have ranks that stand nowhere in the code."""
    output = tmp_path_factory.mktemp("runs")
    values = {
        "name": "short",
        "output": str(output),
        "base": "bem-tiny",
        "dtype": "bfloat16",
        "seeds": [0],
        "data": {
            "tasks": TASKS,
            "train_rows": 8,
            "dev_rows": 4,
            "conversations": {"turns": 2, "max_characters": 500, "turn_characters": 400},
        },
        "adapters": {"rank": 9},
        "routing": {
            "experts": {
                "json": ["forms/json", "sig2json"],
                "other": [f"forms/{ask}" for ask in ("last", "name", "kind", "count", "call")],
            },
            "expert_rank": 3,
            "shared_rank": 2,
            "cloning": {"rows": 8, "epochs": 2},
            "policy_gradient": {"iterations": 1, "episodes": 4, "max_new_tokens": 4},
        },
        "arms": [{"name": "s0", "role": "baseline"}, {"name": "ar1", "route": "ar1"}],
        "training": {"steps": 2, "batch_size": 4, "max_length": 384, "learning_rate": 0.01},
        "gates": {"n_bootstrap": 200, "latency_ratio_max": 1.05},
        "latency_rounds": 1,
        "latency_seconds_max": 1,
    }
    run(parse(ExperimentConfig, values, "t"))
    return RunFolder(output / "short")


@pytest.fixture(scope="module")
def released(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("releases") / "mine"
    make_release(finished.path, "mine", "--out", folder, "--rows", ROWS)
    return Shipped("mine", folder)


@pytest.mark.parametrize(("load", "arm"), [(bem.load, "s0"), (bem.load_router, "ar1")])
def test_it_is_opened_by_its_folder_and_answers_as_the_run_did(finished, released, load, arm):
    ids = torch.arange(5, 95).reshape(1, 90)
    logits = []
    for folder in (finished.cell(arm, 0).checkpoint, released.folder):
        model, _ = bem.load_base("bem-tiny", dtype="bfloat16")
        with torch.inference_mode():
            logits.append(load(model, folder).model(ids).logits)
    assert torch.equal(*logits)  # what computes in bfloat16 is rounded to it anyway


def test_its_files_hold_weights_in_the_dtype_of_the_base(released):
    files = sorted(released.folder.rglob("adapter_model.safetensors"))
    assert len(files) == 4  # static, two experts, the shared one
    assert {t.dtype for file in files for t in load_file(file).values()} == {torch.bfloat16}


def test_the_card_states_the_verdict_and_what_the_files_hold(finished, released):
    card = released.card.read_text(encoding="utf-8")
    verdicts = read_json(finished.verdicts, CheckpointError)
    decision = verdicts["candidates"]["ar1"]["decision"]
    assert f"was judged {decision}." in released.verdict
    assert "2 LoRAs of rank 3 and one of rank 2 that always acts" in card
    assert "one LoRA of rank 9" in card
    assert "| `json` | forms/json, sig2json |" in card
    assert "| gate | value | limit |" in card and "latency_ratio_max 1.05" in released.verdict
    assert "PSF-2.0" in card and "moves a logit by at most 0." in card
    steps = [json.loads(line) for line in finished.cell("s0", 0).metrics.read_text().splitlines()]
    assert f"| static LoRA | 2 | 2 | {sum(s['tokens'] for s in steps):,} |" in card
    assert "The learning rate was set, not searched for." in card


def test_nothing_in_it_says_where_the_run_was(finished, released):
    texts = [p for p in released.folder.rglob("*") if p.suffix in (".md", ".yaml", ".json")]
    assert len(texts) > 5
    for path in texts:
        text = path.read_text(encoding="utf-8")
        assert (
            str(finished.path.parent) not in text and str(Path(bem.__file__).parent) not in text
        ), path
    config = read_json(released.static / "adapter_config.json", CheckpointError)
    assert config["base_model_name_or_path"] == "bem-tiny"


def test_the_demo_measures_it_on_its_own_rows_and_trains_nothing(released, tmp_path):
    config = of_release(released, str(tmp_path), rows=ROWS)
    assert config.base == "bem-tiny" and config.dtype == "bfloat16" and not config.trains
    assert config.gates.latency_ratio_max == 1.05 and "slices" in config.gates.waived
    tasks = load_tasks(config.data, need_train=False)
    assert [len(task.dev) for task in tasks] == [ROWS] * 2
    assert all(row.meta["skills"] for task in tasks for row in task.dev)
    assert [task.primary for task in tasks] == ["f1", "f1"]
    told = []
    done = run(config.model_copy(update={"workers": 1}), told.append)
    assert not [event for event in told if "training" in event.stage or "tracing" in event.stage]
    assert set(done.verdicts) == {"router"}
    report = (done.folder / "report.md").read_text(encoding="utf-8")
    assert "| 2 × 3 + 2 |" in report  # ranks are those of the files


def test_it_is_kept_in_a_version_store_as_a_router(released, tmp_path):
    kept = import_release(Store(tmp_path / "store"), released.folder)
    assert kept.kind == "router" and kept.verdict is None


def test_a_second_call_replaces_it_and_too_large_a_one_is_not_written(finished, released, tmp_path):
    before = released.card.read_bytes()
    make_release(finished.path, "mine", "--out", released.folder, "--rows", ROWS)
    assert released.card.read_bytes() == before
    with pytest.raises(ConfigError, match=r"more than 0\.01: train smaller ranks"):
        make_release(finished.path, "big", "--out", tmp_path / "big", "--most-mb", 0.01)
    assert not list(tmp_path.iterdir())


def test_what_is_neither_a_folder_nor_a_release_is_told_with_the_releases(released, tmp_path):
    model, _ = bem.load_base("bem-tiny")
    for load in (bem.load, bem.load_router):
        with pytest.raises(CheckpointError, match=r"no folder bem-smal .* Releases: bem-smol\."):
            load(model, "bem-smal")
    assert router_of(released.router) == released.router  # a folder that holds one is itself
    assert static_of(tmp_path) == tmp_path


def test_a_release_that_is_not_in_the_installation_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(RELEASES, "gone", Shipped("gone", tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="release gone is not in this installation"):
        router_of("gone")
    with pytest.raises(CheckpointError, match="release gone is not in this installation"):
        _ = RELEASES["gone"].config
