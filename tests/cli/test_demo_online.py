"""The demo's learner: what it says is what came out."""

import io

from rich.console import Console

from bem.cli import demo_online
from bem.online.desk import Desk
from bem.online.stream import Turn
from bem.training.example import Example
from tests.conftest import make_llama, make_tokenizer

WORDS = ["function", "value", "docstring", "return"]


def turns(task, tokenizer, count):
    """Every question has one of four answers, that a random model learns to give."""
    rows = (
        Example(f"{task} {i}", f"{task} {WORDS[i % 4]} {i}", (WORDS[i % 4],)) for i in range(count)
    )
    return [Turn(row, f"user {row.id}", task) for row in rows]


def test_it_tells_what_the_journal_holds_and_replaces_an_earlier_demo(tmp_path, monkeypatch):
    monkeypatch.setattr("bem.bases.load.load_base", lambda name: (make_llama(), make_tokenizer()))
    monkeypatch.setattr(demo_online, "_turns", turns)
    monkeypatch.setattr(demo_online, "EVENTS", 64)
    monkeypatch.setattr(demo_online, "TRUSTED", 12)
    (tmp_path / "demo-online").mkdir()
    (tmp_path / "demo-online" / "old").write_text("of an earlier demo")
    console, progress = Console(file=io.StringIO(), width=300), Console(file=io.StringIO())
    demo_online.learn_online(console, progress, str(tmp_path))
    said, folder = console.file.getvalue(), tmp_path / "demo-online"
    moves = [e["what"] for e in Desk(folder).entries()]
    assert not (folder / "old").exists() and "candidate" in moves
    for word in demo_online.WORDS.values():
        assert f"{moves.count(word)} {word}" in said
    assert "On 6 trusted questions" in said
    assert f"bem online candidates --folder {folder}" in said
