"""The demo: two small experiments that ship with the package, the second only where its base can be had."""

import io

import pytest
from rich.console import Console

from bem.cli import demo as command
from bem.errors import BaseError
from bem.experiments import demos
from bem.releases.named import RELEASES
from bem.tasks.load import load_tasks


def test_both_experiments_are_whole(tmp_path):
    tiny = demos.tiny(str(tmp_path))
    assert tiny.base == "bem-tiny" and tiny.tuning is not None
    smol = demos.smol(str(tmp_path), rows=4)
    assert smol.base == RELEASES["bem-smol"].base and not smol.trains
    assert smol.routing is not None and smol.routing.checkpoint == "bem-smol"


def test_the_held_out_rows_ship_with_the_release(tmp_path):
    config = demos.smol(str(tmp_path), rows=4)
    tasks = load_tasks(config.data, need_train=False)
    assert [len(task.dev) for task in tasks] == [4] * 5
    assert all(row.history and row.meta["skills"] for task in tasks for row in task.dev)


def test_where_the_real_base_cannot_be_fetched_it_says_so(monkeypatch):
    def absent(name):
        raise BaseError(f"pip found no {name}: no network.")

    monkeypatch.setattr("bem.bases.load.find_base", absent)
    console = Console(file=io.StringIO(), width=200)
    assert not command._base_is_there(console)
    said = console.file.getvalue()
    assert "left out: smollm2-135m cannot be fetched" in said and "no network" in said


@pytest.mark.parametrize("decision", ["PROMOTE", "REJECT", "INCONCLUSIVE"])
def test_the_card_states_the_verdict_of_the_whole_run(decision, monkeypatch, tmp_path):
    """Whatever it was: the demo shows the card's own words up to its table."""
    folder = tmp_path / "bem-smol"
    folder.mkdir()
    (folder / "README.md").write_text(
        f"# x\n\n## Verdict\n\n**ar1: {decision}.** why\n\n| gate |\n\n## Training\n"
    )
    monkeypatch.setattr(type(RELEASES["bem-smol"]), "folder", property(lambda self: folder))
    console = Console(file=io.StringIO(), width=200)
    command._show_card(console)
    assert f"ar1: {decision}. why" in console.file.getvalue()
    assert "gate" not in console.file.getvalue()
