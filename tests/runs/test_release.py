"""A release is named by its content, and made only of a checkpoint that is what its manifest says."""

import hashlib
import json

import pytest

from bem.errors import CheckpointError
from bem.runs.release import MANIFEST, Release, parse_release, read_content
from tests.runs.contents import BASE, WEIGHTS, make_content, sha256


def test_the_id_is_the_sha256_of_the_manifest_and_any_other_fact_makes_another(tmp_path):
    content = make_content(tmp_path, {WEIGHTS: "w"})
    release = Release.of(content, "d" * 64, None, "here")
    assert release.id == hashlib.sha256(release.to_bytes()).hexdigest()
    assert parse_release(release.to_bytes(), "x") == release
    others = [Release.of(content, v, p, s) for v, p, s in [
        ("e" * 64, None, "here"), ("d" * 64, "p" * 64, "here"), ("d" * 64, None, "there"),
    ]]  # fmt: skip
    assert len({r.id for r in (release, *others)}) == 4
    assert {r.version for r in others} == {release.version}
    assert release.objects == {sha256("w"), sha256((tmp_path / MANIFEST).read_bytes()), "d" * 64}


def spoilt(folder, **changes):
    """The folder, its manifest changed."""
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "peer"}, "holds a 'peer': a release is one of adapter, router"),
        ({"base": {"digest": "x"}}, "no manifest of a checkpoint of this version"),
        ({"version": None}, "no manifest of a checkpoint of this version"),
        ({"files": {WEIGHTS: "0" * 64}}, "was changed after saving"),
        ({"files": {"gone": "0" * 64}}, "gone is missing"),
        ({"files": {"../outside": "0" * 64}}, "which lies outside"),
        ({"files": ["a"]}, "lists no files with their sha256"),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(tmp_path, changes, message):
    make_content(tmp_path / "c", {WEIGHTS: "w"})
    with pytest.raises(CheckpointError, match=message):
        read_content(spoilt(tmp_path / "c", **changes))


def test_a_name_that_would_leave_the_folder_it_is_unpacked_to_is_refused(tmp_path):
    make_content(tmp_path / "c", {WEIGHTS: "w"})
    for name in (str(tmp_path / "c" / WEIGHTS), f"../c/{WEIGHTS}", MANIFEST):
        digest = sha256((tmp_path / "c" / name).read_bytes())
        with pytest.raises(CheckpointError, match=r"names no file|was changed"):
            read_content(spoilt(tmp_path / "c", files={name: digest}))


def test_a_manifest_that_was_exchanged_since_it_was_judged_is_refused(tmp_path):
    content = make_content(tmp_path, {WEIGHTS: "w"})
    assert read_content(tmp_path, content.files[MANIFEST]).base == BASE
    with pytest.raises(CheckpointError, match="was changed after it was judged"):
        read_content(tmp_path, "0" * 64)
