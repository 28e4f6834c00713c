"""Only a verdict that says PROMOTE, on evidence that is still what it was, moves the pointer."""

import json
import shutil

import pytest

from bem.errors import CheckpointError, NotAccepted
from bem.files import read_json, sha256_json, write_json
from bem.runs.folder import RunFolder, checkpoint_kind
from bem.runs.promotion import current, promote
from bem.runs.verdicts import judge_run
from tests.experiments import routed_run
from tests.experiments.finished_run import make_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(finished, tmp_path) -> RunFolder:
    """A copy that a test may spoil."""
    return RunFolder(shutil.copytree(finished.path, tmp_path / "finished"))


def test_an_accepted_arm_is_pointed_at(run):
    pointer = promote(run.path, "v1")
    assert pointer.checkpoint == run.cell("v1", 0).checkpoint
    assert current(run.path.parent) == pointer
    assert read_json(pointer.path)["checkpoint"] == "finished/arms/v1/seed-0/checkpoint"


def test_the_seed_can_be_chosen(run):
    assert promote(run.path, "v1", seed=1).checkpoint == run.cell("v1", 1).checkpoint
    with pytest.raises(NotAccepted, match=r"no seed 7\. Seeds: 0, 1"):
        promote(run.path, "v1", seed=7)


@pytest.mark.parametrize(
    ("arm", "reason"),
    [
        ("v3", "v3 was judged REJECT"),
        ("v4", "v4 was judged INCONCLUSIVE"),
        ("v1-random", "v1-random is a control"),
        ("s0", "s0 is the baseline"),
        ("v9", "No arm 'v9' was judged. Judged: v1, v3, v4"),
    ],
)
def test_anything_else_is_refused_and_the_pointer_stays(run, arm, reason):
    before = promote(run.path, "v1").path.read_bytes()
    with pytest.raises(NotAccepted, match=reason):
        promote(run.path, arm)
    assert (run.path.parent / "promoted.json").read_bytes() == before


def test_a_changed_verdict_is_refused(run):
    _edit_verdict(run, "v3", sign=False)
    with pytest.raises(NotAccepted, match="was changed after it was written"):
        promote(run.path, "v3")


def test_a_forged_verdict_does_not_survive_being_judged_again(run):
    _edit_verdict(run, "v3", sign=True)
    with pytest.raises(NotAccepted, match="Judged again, v3 comes out REJECT"):
        promote(run.path, "v3")
    assert current(run.path.parent) is None


@pytest.mark.parametrize("arm", ["v1", "s0"])
def test_changed_scores_are_refused(run, arm):
    path = run.cell(arm, 1).measurement
    values = json.loads(path.read_text())
    values["metrics"]["em"][0][0] = 1.0 - values["metrics"]["em"][0][0]
    path.write_text(json.dumps(values))
    with pytest.raises(NotAccepted, match=f"arms/{arm}/seed-1/measurement.json"):
        promote(run.path, "v1")


def test_changed_gates_are_refused(run):
    path = run.path / "config.yaml"
    path.write_text(path.read_text().replace("useful_gain_points: 1.0", "useful_gain_points: 0.1"))
    with pytest.raises(NotAccepted, match=r"config\.yaml"):
        promote(run.path, "v1")


def test_changed_weights_are_refused(run):
    weights = run.cell("v1", 0).checkpoint / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="was changed after saving"):
        promote(run.path, "v1")
    assert current(run.path.parent) is None


def test_an_unfinished_run_is_refused(run):
    run.verdicts.unlink()
    with pytest.raises(CheckpointError, match=r"No verdicts.json .*`bem run` resumes it"):
        promote(run.path, "v1")


def test_a_method_that_bem_cannot_serve_is_refused(run):
    manifest = run.cell("v1", 0).checkpoint / "manifest.json"
    write_json(manifest, {**read_json(manifest), "kind": "peer"})
    judge_run(run, run.config, ["em", "f1"])
    with pytest.raises(NotAccepted, match="v1 is a method of PEFT's"):
        promote(run.path, "v1")


def test_a_checkpoint_that_mentions_a_router_is_none(run):
    manifest = run.cell("v1", 0).checkpoint / "manifest.json"
    write_json(manifest, {**read_json(manifest), "extra": {"note": '"kind": "router"'}})
    judge_run(run, run.config, ["em", "f1"])
    assert promote(run.path, "v1").arm == "v1"


def _edit_verdict(run: RunFolder, arm: str, sign: bool) -> None:
    values = read_json(run.verdicts)
    values["candidates"][arm]["decision"] = "PROMOTE"
    if sign:
        values.pop("sha256")
        values["sha256"] = sha256_json(values)
    write_json(run.verdicts, values)


def test_an_accepted_router_is_pointed_at_and_a_changed_expert_is_refused(tmp_path):
    folder = routed_run.make_run(tmp_path, ("s0", "ar1"))
    pointer = promote(folder.path, "ar1")
    assert checkpoint_kind(pointer.checkpoint) == "router" and current(tmp_path) == pointer
    weights = next(pointer.checkpoint.rglob("adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match="was changed"):
        promote(folder.path, "ar1")
