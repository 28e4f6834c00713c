"""Saved adapters and routers are measured as they are: nothing is trained, nothing is changed."""

import pytest
import torch
import yaml

import bem
from bem.adapters.version import Version
from bem.config import ExperimentConfig, load, parse
from bem.errors import BaseMismatch, CheckpointError, ConfigError
from bem.experiments.run import run, train_router
from bem.files import read_json
from bem.routing.mount import blank_expert, mount
from bem.runs.folder import RunFolder
from bem.stats.files import load as load_scores


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A static LoRA and a router with two experts and a shared one, as they begin."""
    folder = tmp_path_factory.mktemp("saved")
    model, _ = bem.load_base("bem-tiny")
    attached = bem.attach(model, "s0", rank=4)
    attached.save(folder / "static")
    model = attached.detach()
    blanks = [blank_expert(model, name, 2) for name in ("json", "name", "shared")]
    mounted = mount(model, blanks, shared="shared")
    mounted.router.trained = True
    mounted.save(folder / "router")
    return folder


def values(saved, tmp_path, **changes):
    arms = [
        {"name": "s0", "checkpoint": str(saved / "static"), "role": "baseline"},
        {"name": "ar1", "route": "ar1"},
        {"name": "gold", "route": "gold", "role": "control"},
    ]
    routing = {
        "experts": {"json": ["sig2json"], "name": ["doc2name"]},
        "expert_rank": 2,
        "shared_rank": 2,
        "checkpoint": str(saved / "router"),
    }
    return {
        "name": "saved",
        "output": str(tmp_path),
        "seeds": [0],
        "data": {"tasks": ["sig2json", "doc2name"], "dev_rows": 2, "conversations": {"turns": 2}},
        "routing": routing,
        "arms": arms,
        "latency_rounds": 1,
        "gates": {"waived": ["latency"], "n_bootstrap": 100},
        **changes,
    }


def test_a_run_of_saved_arms_trains_nothing_and_keeps_their_versions(saved, tmp_path):
    config = parse(ExperimentConfig, values(saved, tmp_path), "t")
    told = []
    run(config, told.append)
    folder = RunFolder(tmp_path / "saved")
    assert not [event for event in told if "training" in event.stage or "tracing" in event.stage]
    for arm, source in (("s0", "static"), ("ar1", "router")):
        before = read_json(saved / source / "manifest.json", CheckpointError)
        after = read_json(folder.cell(arm, 0).checkpoint / "manifest.json", CheckpointError)
        assert Version.from_dict(after["version"]) == Version.from_dict(before["version"])
    scores = load_scores(folder.cell("ar1", 0).measurement)
    assert scores.n == 4
    assert "as they were saved" in (folder.path / "report.md").read_text(encoding="utf-8")
    assert load(folder.path / "config.yaml") == config
    told.clear()
    run(config, told.append)
    assert sum(event.stage == "finished before: skipped" for event in told) == 3


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"training": {"steps": 3}}, "training has no effect with a checkpoint"),
        ({"role": "candidate"}, "match has no effect with a checkpoint.*Set `match: none`"),
        ({"route": "ar1"}, "Give `routing.checkpoint` instead"),
        ({"adapters": {"variant": "s0", "rank": 9}}, "rank has no effect with a checkpoint"),
    ],
)
def test_what_a_checkpoint_decides_cannot_be_set_beside_it(saved, tmp_path, arm, message):
    given = values(saved, tmp_path)
    extra = {"name": "x", "checkpoint": str(saved / "static"), "match": "none", **arm}
    if arm.get("role"):
        del extra["match"]
    given["arms"].append(extra)
    with pytest.raises(ConfigError, match=message):
        parse(ExperimentConfig, given, "t")


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ({"training": {"steps": 3}}, "routing.training has no effect"),
        ({"experts": {}}, "which expert serves which skill"),
        ({"router": {"switch_cost": 0.3}}, "routing.router has no effect with routing.checkpoint"),
        ({"policy_gradient": {"iterations": 1}}, "routing.policy_gradient has no effect"),
    ],
)
def test_a_saved_router_is_taken_whole(saved, tmp_path, routing, message):
    given = values(saved, tmp_path)
    given["routing"] |= routing
    with pytest.raises(ConfigError, match=message):
        parse(ExperimentConfig, given, "t")
    given = values(saved, tmp_path)
    given["arms"].append({"name": "single", "route": "single", "role": "control"})
    with pytest.raises(ConfigError, match=r"route single needs stages"):
        parse(ExperimentConfig, given, "t")


def test_a_router_learns_the_makers_labels_over_experts_that_stay_as_they_were_saved(
    saved, tmp_path
):
    given = values(saved, tmp_path)
    given["data"] |= {"train_rows": 40}
    given["routing"] |= {"labelled_rows": 60}
    given["arms"][1:] = [
        {"name": "fitted", "route": "fitted"},
        {"name": "linear", "route": "linear", "role": "control"},
    ]
    run(parse(ExperimentConfig, given, "t"))
    made = RunFolder(tmp_path / "saved").routing(0) / "fitted"
    experts = "experts/json/adapter_model.safetensors"
    files = [read_json(f / "manifest.json", CheckpointError)["files"] for f in (made, saved / "router")]  # fmt: skip
    assert files[0][experts] == files[1][experts]
    record = read_json(made / "fit.json", CheckpointError)
    assert [score["name"] for score in record["scores"]] == ["router"]
    assert sum(record["rows"]["train"].values()) + len(record["held_out"]) == 60
    assert (
        record["scores"][0]["accuracy"]["value"] > 0.9
    )  # "sig2json" and "doc2name" ask differently


def test_other_experts_or_another_variant_are_refused_by_name(saved, tmp_path):
    given = values(saved, tmp_path)
    given["routing"]["experts"] = {"json": ["sig2json"], "word": ["doc2name"]}
    with pytest.raises(
        ConfigError, match=r"holds the experts json, name, shared; .* json, word, shared"
    ):
        run(parse(ExperimentConfig, given, "t"))
    given = values(saved, tmp_path / "b")
    given["arms"][0]["adapters"] = {"variant": "v1"}
    with pytest.raises(
        ConfigError, match=r"holds the variant s0. Say so: adapters: \{variant: s0\}"
    ):
        run(parse(ExperimentConfig, given, "t"))
    given["arms"][0] = {"name": "s0", "checkpoint": "nowhere", "role": "baseline"}
    with pytest.raises(CheckpointError, match="nowhere"):
        run(parse(ExperimentConfig, given, "t"))


def test_a_folder_without_a_manifest_is_no_run_that_has_to_be_finished(saved, tmp_path):
    given = values(saved, tmp_path)
    (tmp_path / "lora").mkdir()
    given["arms"][0] = {"name": "s0", "checkpoint": str(tmp_path / "lora"), "role": "baseline"}
    with pytest.raises(CheckpointError, match=r"Arm s0: .* no saved adapter: .*bem\.load"):
        run(parse(ExperimentConfig, given, "t"))


def test_a_tilde_is_the_home_folder(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(saved))
    given = values(saved, tmp_path)
    given["arms"][0]["checkpoint"], given["routing"]["checkpoint"] = "~/static", "~/router"
    assert parse(ExperimentConfig, given, "t") == parse(
        ExperimentConfig, values(saved, tmp_path), "t"
    )


def test_an_adapter_of_another_base_is_refused_before_anything_is_trained(saved, tmp_path):
    model = bem.load_base("bem-tiny")[0]
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    bem.attach(model, "s0", rank=4).save(tmp_path / "other")
    given = values(saved, tmp_path)
    given["arms"] = [
        {"name": "trained", "role": "baseline"},
        {"name": "other", "checkpoint": str(tmp_path / "other"), "match": "none"},
    ]
    del given["routing"]
    told = []
    with pytest.raises(BaseMismatch, match="other"):
        run(parse(ExperimentConfig, given, "t"), told.append)
    assert not [event for event in told if "training" in event.stage]


def test_saved_arms_stand_beside_a_base_that_is_shown_examples(saved, tmp_path):
    given = values(saved, tmp_path)
    given["arms"] = [given["arms"][0], {"name": "few", "shots": 1, "role": "control"}]
    del given["routing"]
    given["data"] = {"tasks": ["sig2json"], "dev_rows": 2, "train_rows": 9}
    run(parse(ExperimentConfig, given, "t"))
    assert load_scores(RunFolder(tmp_path / "saved").cell("few", 0).measurement).n == 2


def test_the_report_states_what_was_saved_not_what_the_settings_would_have_made(saved, tmp_path):
    given = values(saved, tmp_path)
    given["routing"]["expert_rank"] = 7
    run(parse(ExperimentConfig, given, "t"))
    report = (tmp_path / "saved" / "report.md").read_text(encoding="utf-8")
    assert "| 2 × 2 + 2 |" in report and "× 7" not in report
    with pytest.raises(ConfigError, match="a router that was saved, so there is none to train"):
        train_router(parse(ExperimentConfig, given, "t"), 0)


def test_the_resolved_config_is_yaml_that_can_be_run_again(saved, tmp_path):
    config = parse(ExperimentConfig, values(saved, tmp_path), "t")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load(path) == config
