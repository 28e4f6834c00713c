"""What is kept of a run is enough to judge it again."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.finished_run import make_run

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "kept_scores.py"


def call(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    home = tmp_path_factory.mktemp("kept")
    run = make_run(home).path
    archives = [home / "a.tar.xz", home / "b.tar.xz"]
    for archive in archives:
        made = call("keep", run, archive)
        assert made.returncode == 0, made.stderr
    return archives


def test_the_same_run_gives_the_same_bytes(kept):
    one, other = kept
    assert one.read_bytes() == other.read_bytes()


def test_it_is_judged_as_it_was_and_by_other_gates(kept):
    said = call("judge", kept[0]).stdout
    assert "v1: PROMOTE (as then)" in said and "v3: REJECT (as then)" in said
    stricter = call("judge", kept[0], "--set", "gates.quality_margin=50").stdout
    assert "v1: PROMOTE" not in stricter and "(then PROMOTE)" in stricter


def test_an_archive_that_is_not_there_is_named(tmp_path):
    refused = call("judge", tmp_path / "x.tar.xz")
    assert refused.returncode == 1 and "No archive at" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_unfinished_run_is_refused(tmp_path):
    refused = call("keep", tmp_path, tmp_path / "x.tar.xz")
    assert refused.returncode == 1 and "has the run finished?" in refused.stderr
