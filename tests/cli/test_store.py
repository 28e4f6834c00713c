"""The commands of the version store say what is in use, and refuse with one message."""

import re
import shutil

import pytest

from bem.cli import main
from bem.runs.store import Store
from tests.experiments.finished_run import make_run
from tests.runs.contents import WEIGHTS, make_content, make_grounds


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def store(finished, tmp_path, monkeypatch, capsys):
    """runs/store in the current folder: v1 was promoted, then another adapter for the same base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(finished.path, "runs/finished")
    code, out = bem_command(capsys, "promote", "runs/finished", "v1", "--by", "ada")
    assert code == 0 and "Promoted finished: v1, seed 0: version" in out
    store = Store("runs/store", by="ada")
    other = make_content(tmp_path / "other", {WEIGHTS: "w"}, base=store.current().base)
    store.promote(other, make_grounds(tmp_path))
    return store


def bem_command(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stopped.value.code, captured.out + captured.err


def test_history_and_rollback(store, capsys):
    first, second = store.journal.ledger().entries
    code, out = bem_command(capsys, "rollback", "--reason", "answers got longer", "--by", "bob")
    assert code == 0 and f"Rolled back to version {first.version[:12]}" in out
    code, out = bem_command(capsys, "history")
    rows = [line.split() for line in out.splitlines() if re.match(r"\d ", line)]
    assert [(row[0], row[3], row[4], row[5], row[6]) for row in rows] == [
        ("1", "ada", "promote", first.version[:12], first.verdict[:12]),
        ("2", "ada", "promote", second.version[:12], second.verdict[:12]),
        ("3", "bob", "rollback", first.version[:12], first.verdict[:12]),
    ]
    assert code == 0 and "answers got longer" in out
    assert f"In use: version {first.version[:12]}, finished: v1, seed 0: entry 3 put it" in out
    code, out = bem_command(
        capsys, "rollback", second.version[:8], "--reason", "no, it was not that"
    )
    assert code == 0 and store.current().version == second.version


def test_what_is_refused_is_one_message(store, capsys, tmp_path):
    for arguments, message in (
        (["rollback"], "A rollback needs a reason: --reason TEXT"),
        (["rollback", "beef", "--reason", "x"], "has no whole version 'beef'"),
        (["history", "--store", tmp_path / "none"], "is no version store. `bem promote` makes one"),
        (["store", "collect", "--keep", "0"], "keep must be 1 or more"),
        (["store", "import", tmp_path / "none"], "no release of that name. Releases: bem-smol"),
    ):
        code, out = bem_command(capsys, *arguments)
        assert code == 3 and message in out and "Traceback" not in out
    assert len(store.journal.ledger().entries) == 2


def test_damage_is_shown_and_repaired(store, capsys):
    assert bem_command(capsys, "store", "check") == (
        0,
        "runs/store: everything is as it was written.\n",
    )
    store.journal.pointer_file.write_text("{}")
    for command in (["store", "check"], ["history"]):
        code, out = bem_command(capsys, *command)
        assert code == 1 and out.count("runs/store/current.json was changed after it") >= 1
    code, out = bem_command(capsys, "store", "repair", "--reason", "power cut")
    assert (code == 0 and "Repaired: version" in out) or "is in use" in out
    assert bem_command(capsys, "store", "check")[0] == 0
    assert "nothing to do" in bem_command(capsys, "store", "repair")[1]


def test_import_and_collect(store, capsys):
    checkpoint = "runs/finished/arms/v4/seed-0/checkpoint"
    code, out = bem_command(capsys, "store", "import", checkpoint)
    assert code == 0 and "not in use" in out and len(list(store.shelf.releases.iterdir())) == 3
    code, out = bem_command(capsys, "store", "collect", "--keep", "1")
    assert (
        code == 0 and "Collected 0 releases and 0 files" in out
    )  # in use, the one before, the newest
