"""A state is read as it was written, or refused."""

import errno

import pytest
import torch

from bem.errors import TrainingError
from bem.training.state import (
    check_same_run,
    check_same_start,
    disk,
    read_state,
    write_state,
)
from bem.variants.digest import weights_digest


@pytest.fixture
def path(tmp_path):
    write_state(tmp_path / "state.pt", {"weights": torch.arange(999.0), "step": 3})
    return tmp_path / "state.pt"


def test_it_is_read_as_it_was_written_also_by_torch_alone(path):
    for state in (read_state(path, "cpu", "x"), torch.load(path, weights_only=True)):
        assert torch.equal(state["weights"], torch.arange(999.0)) and state["step"] == 3
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.9, 0.999])
def test_a_part_of_it_is_recognised(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(TrainingError, match=r"arm: .*state\.pt is half written.*Delete it"):
        read_state(path, "cpu", "arm")


def test_a_middle_that_was_lost_is_recognised_though_torch_would_read_it(path):
    """As after a power cut: the length is right, some of the content is zeros."""
    content = bytearray(path.read_bytes())
    content[1024:2048] = bytes(1024)
    path.write_bytes(bytes(content))
    assert not torch.equal(torch.load(path, weights_only=True)["weights"], torch.arange(999.0))
    with pytest.raises(TrainingError, match="half written or was changed"):
        read_state(path, "cpu", "arm")


def test_a_state_that_is_missing_or_foreign_is_an_error_of_ours(path):
    with pytest.raises(TrainingError, match=r"cannot be read \(FileNotFoundError"):
        read_state(path.with_name("other.pt"), "cpu", "arm")
    path.write_text("not ours")
    with pytest.raises(TrainingError, match="half written or was changed"):
        read_state(path, "cpu", "arm")


def test_what_differs_from_another_run_is_named(path):
    before = {"training": {"steps": 100, "clip": 1.0}, "seed": 0, "data": "abc"}
    check_same_run(path, before, before, "arm")
    now = {"training": {"steps": 200, "clip": 1.0}, "seed": 1, "data": "abc"}
    with pytest.raises(
        TrainingError, match=r"training\.steps was 100, is 200; seed was 0, is 1\. "
    ):
        check_same_run(path, before, now, "arm")
    with pytest.raises(TrainingError, match=r"seed was 0, is not known and 1 more\. Set them"):
        check_same_run(path, before, {"training": {}}, "arm")


def test_a_setting_that_an_older_version_did_not_have_is_said_to_be_unknown_to_it(path):
    now = {"training": {"steps": 2, "padding": 0.1}, "objective": None}
    with pytest.raises(TrainingError, match=r"training\.padding was not known, is 0\.1\. "):
        check_same_run(path, {"training": {"steps": 2}}, now, "s0")
    check_same_run(path, {"training": now["training"]}, now, "s0")


def test_a_run_goes_on_from_its_start_and_from_where_it_was_but_from_nowhere_else(path):
    start, saved, other = ({"w": torch.full((2,), float(i))} for i in range(3))
    for now in (start, saved):
        check_same_start(path, weights_digest(start), [saved], now, "arm")
    with pytest.raises(TrainingError, match="begun from other weights"):
        check_same_start(path, weights_digest(start), [saved], other, "arm")


def test_a_full_disk_is_a_training_error_that_says_what_is_whole(tmp_path):
    message = r"no space is left\. Step 2 is whole\. Free some space"
    wrong = pytest.raises(TrainingError, match=message)
    with wrong, disk("arm", "the state", tmp_path, "Step 2 is whole. "):
        raise OSError(errno.ENOSPC, "No space left on device")
