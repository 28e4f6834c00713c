"""`bem online`: the loop on a recorded stream, and what it says of itself."""

import io
import json
import sys

import pytest

from tests.cli.test_store import bem_command

SETTINGS = (
    "round_size=8", "batch_size=8", "learning_rate=0.05", "largest_step=1.0", "largest_distance=100.0",
    "candidate_every=16", "margin=0.3", "tolerance=0.3", "drift_window=200", "held_share=0.3", "max_length=64",
    "watch_events=16", "steps_per_round=8",
)  # fmt: skip
WORDS = ["function", "value", "docstring", "return"]


@pytest.fixture(scope="module")
def replayed(tmp_path_factory, micro_base):
    """A stream whose every question has one of four answers, that a random model learns to give."""
    folder = tmp_path_factory.mktemp("online")
    rows = [
        {"id": f"r{i}", "input": f"name the {WORDS[i % 4]} {i}", "references": [WORDS[i % 4]]}
        for i in range(160)
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sets = [part for text in SETTINGS for part in ("--set", text)]
    command = ["online", "replay", folder / "log.jsonl", "--base", micro_base, "--score", "tokens"]
    return folder, [*command, "--folder", folder / "online", "--rank", 4, *sets]


def test_a_replay_learns_promotes_and_says_why(replayed, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder, command = replayed
    code, out = bem_command(capsys, *command)
    assert code == 0 and "promoted" in out and "Scores, by tenths" in out
    where = ("--folder", folder / "online")
    code, out = bem_command(capsys, "online", "status", *where)
    assert code == 0 and "in use: version" in out and "learning: on" in out
    code, out = bem_command(capsys, "online", "candidates", *where)
    line = next(line for line in out.splitlines() if "promoted" in line)
    number, _, version = line.split()[:3]
    code, by_number = bem_command(capsys, "online", "why", number, *where)
    assert code == 0 and "e-value not worse" in by_number and "score held_out" in by_number
    code, by_version = bem_command(capsys, "online", "why", version, *where)
    assert code == 0 and "promoted" in by_version
    code, out = bem_command(capsys, "history", "--store", folder / "store")
    assert code == 0 and "online: candidate" in out
    code, out = bem_command(capsys, *command)
    assert code == 0 and "Goes on after event 160." in out


def test_pause_and_resume(replayed, capsys):
    where = ("--folder", replayed[0] / "online")
    code, _ = bem_command(capsys, "online", "pause", "--reason", "a look", *where)
    assert code == 0 and "learning: paused" in bem_command(capsys, "online", "status", *where)[1]
    assert "goes on" in bem_command(capsys, "online", "resume", *where)[1]
    assert "was not paused" in bem_command(capsys, "online", "resume", *where)[1]


def test_mistakes_are_one_message(replayed, tmp_path, capsys):
    _, command = replayed
    code, out = bem_command(capsys, *command[:3], "--set", "margn=0.1")
    assert code == 3 and "unknown key 'margn'" in out
    code, out = bem_command(capsys, *command, "--set", "margin=0.2")
    assert code == 3 and "online.margin was 0.3, is 0.2" in out
    code, out = bem_command(capsys, "online", "status", "--folder", tmp_path)
    assert code == 3 and "is no learner's folder" in out
    code, out = bem_command(capsys, "online", "why", "beef", "--folder", replayed[0] / "online")
    assert code == 3 and "nothing is noted of 'beef'" in out


def test_a_server_that_could_never_learn_does_not_start(capsys, monkeypatch):
    code, out = bem_command(capsys, "serve", "--learn", "--port", "0")
    assert code == 3 and "give keys" in " ".join(out.split())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"learn!\n")))
    code, out = bem_command(capsys, "online", "learn")
    assert code == 3 and "bem serve --learn" in " ".join(out.split())
