"""Only a verdict that says PROMOTE, on evidence that is still what it was, puts a release into use."""

import json
import shutil

import pytest

from bem.errors import CheckpointError, NotAccepted
from bem.files import read_json, sha256_file, sha256_json, write_json
from bem.runs.folder import RunFolder
from bem.runs.promotion import import_release, promote, store_of
from bem.runs.store import Store
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


def version_of(checkpoint) -> str:
    return read_json(checkpoint / "manifest.json")["version"]["digest"]


def nothing_is_in_use(run: RunFolder) -> bool:
    return not store_of(run.path).path.exists()


def test_an_accepted_arm_is_in_use_with_the_verdicts_it_rests_on(run):
    release = promote(run.path, "v1")
    assert store_of(run.path).path == run.path.parent / "store"
    assert store_of(run.path).current() == release
    assert release.version == version_of(run.cell("v1", 0).checkpoint)
    assert (release.source, release.kind) == ("finished: v1, seed 0", "adapter")
    kept = store_of(run.path).shelf.objects / release.verdict
    assert (
        release.verdict == sha256_file(run.verdicts)
        and kept.read_bytes() == run.verdicts.read_bytes()
    )


def test_the_seed_and_the_store_can_be_chosen(run, tmp_path):
    store = Store(tmp_path / "elsewhere", by="ada")
    release = promote(run.path, "v1", seed=1, store=store)
    assert release.version == version_of(run.cell("v1", 1).checkpoint)
    assert store.current() == release and store.journal.ledger().entries[0].by == "ada"
    with pytest.raises(NotAccepted, match=r"no seed 7\. Seeds: 0, 1"):
        promote(run.path, "v1", seed=7)
    assert nothing_is_in_use(run)


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
def test_anything_else_is_refused_and_what_is_in_use_stays(run, arm, reason):
    release = promote(run.path, "v1")
    with pytest.raises(NotAccepted, match=reason):
        promote(run.path, arm)
    assert store_of(run.path).current() == release


def test_a_changed_verdict_is_refused(run):
    _edit_verdict(run, "v3", sign=False)
    with pytest.raises(NotAccepted, match="was changed after it was written"):
        promote(run.path, "v3")


def test_a_forged_verdict_does_not_survive_being_judged_again(run):
    _edit_verdict(run, "v3", sign=True)
    with pytest.raises(NotAccepted, match="Judged again, v3 comes out REJECT"):
        promote(run.path, "v3")
    assert nothing_is_in_use(run)


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
    assert nothing_is_in_use(run)


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
    assert promote(run.path, "v1").kind == "adapter"


def _edit_verdict(run: RunFolder, arm: str, sign: bool) -> None:
    values = read_json(run.verdicts)
    values["candidates"][arm]["decision"] = "PROMOTE"
    if sign:
        values.pop("sha256")
        values["sha256"] = sha256_json(values)
    write_json(run.verdicts, values)


def test_an_accepted_router_is_in_use_and_a_changed_expert_is_refused(tmp_path):
    folder = routed_run.make_run(tmp_path, ("s0", "ar1"))
    release = promote(folder.path, "ar1")
    assert release.kind == "router" and store_of(folder.path).current() == release
    assert {name.split("/")[1] for name in release.files if "/" in name} == {"json", "intent", "qa"}
    weights = next(folder.cell("ar1", 0).checkpoint.rglob("adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match="was changed"):
        promote(folder.path, "ar1")


def test_what_nobody_judged_is_imported_and_not_put_into_use(run, tmp_path):
    store = Store(tmp_path / "elsewhere")
    checkpoint = run.cell("v3", 0).checkpoint
    release = import_release(store, checkpoint)
    assert release.version == version_of(checkpoint) and store.current() is None
    with pytest.raises(NotAccepted, match="was never in use"):
        store.rollback(release.version, reason="x")
    with pytest.raises(
        CheckpointError, match=r"There is no folder .*nothing .* Releases: bem-smol"
    ):
        import_release(store, tmp_path / "nothing")
