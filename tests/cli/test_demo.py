"""The demo: the verdict comes first, whatever it is; only what a verdict allows goes into use."""

import io

import pytest
from rich.console import Console

from bem.cli import demo as command
from bem.cli.demo import Done
from bem.errors import BaseError
from bem.experiments import demos
from bem.experiments.run import RunResult
from bem.releases.named import Shipped
from bem.runs.promotion import store_of
from bem.runs.verdicts import read_verdicts
from tests.experiments.finished_run import make_run as make_finished
from tests.experiments.routed_run import make_run as make_routed

CARD = "# x\n\n## Verdict\n\n**The router {what}.** `ar1` was judged {decision}.\n\n| gate |\n"


def done_of(folder):
    verdicts = read_verdicts(folder.verdicts).judgement.candidates
    return Done(folder.config, RunResult(folder.path, verdicts, folder.path / "report.html"))


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """v1 is clearly better, v3 worse, v4 equal."""
    return done_of(make_finished(tmp_path_factory.mktemp("one"), name="demo-tiny"))


@pytest.fixture
def release(tmp_path):
    folder = tmp_path / "bem-smol"
    folder.mkdir()
    (folder / "config.yaml").write_text("base: micro\n")
    (folder / "README.md").write_text(CARD.format(what="lost", decision="REJECT"))
    return Shipped("bem-smol", folder)


def test_the_first_half_is_whole(tmp_path):
    tiny = demos.tiny(str(tmp_path))
    assert tiny.base == "bem-tiny" and tiny.output == str(tmp_path)
    assert tiny.tuning is not None  # no candidate wins by its learning rate alone
    assert {arm.role for arm in tiny.arms} == {"baseline", "candidate"}


def test_the_first_line_is_the_verdict_of_the_real_base(console, first, release, tmp_path):
    second = done_of(make_routed(tmp_path, ("s0", "ar1"), name="demo-bem-smol"))
    command._tell(console, first, second, release, None)
    said = console.file.getvalue()
    assert said.splitlines()[0] == second.headline
    assert f"ar1 {second.result.verdicts['ar1'].decision}" in said
    assert "v3 REJECT" in said and "v1 PROMOTE" in said  # the first half too
    assert "A held-out conversation under ar1" in said and "the policy prefers" in said
    assert "The run that bem-smol comes from: The router lost. `ar1` was judged REJECT." in said


def test_without_the_real_base_the_first_half_stands_alone(console, first, release):
    command._tell(console, first, None, release, "pip found no smollm2-135m: no network.")
    said = console.file.getvalue()
    assert said.splitlines()[0] == first.headline == "On micro: " + said.splitlines()[0][10:]
    assert "2. Left out, a shipped router on a real base: pip found no smollm2-135m" in said


def test_a_base_that_cannot_be_fetched_or_a_missing_release_is_a_reason(monkeypatch, tmp_path):
    assert "is not in this installation" in command._missing(Shipped("x", tmp_path / "x"))

    def absent(name):
        raise BaseError(f"pip found no {name}: no network.")

    (tmp_path / "config.yaml").write_text("name: x\ndata: {tasks: [forms]}\narms: [{name: s0, role: baseline}]\n")  # fmt: skip
    monkeypatch.setattr("bem.bases.load.find_base", absent)
    assert command._missing(Shipped("x", tmp_path)) == "pip found no bem-tiny: no network."


def test_the_best_candidate_with_a_promote_verdict_goes_into_use(console, tmp_path):
    done = done_of(make_finished(tmp_path, name="demo-tiny"))
    store = store_of(done.result.folder)
    command._keep(console, done, None)
    assert store.current().source == "demo-tiny: v1, seed 0"
    command._keep(console, done, None)  # a demo that is run again
    assert len([e for e in store.journal.ledger().entries if e.event == "promote"]) == 1
    assert "v1 is in use in" in console.file.getvalue()


def test_what_somebody_else_put_into_use_stays(console, tmp_path):
    mine = make_finished(tmp_path, name="mine")
    command._keep(console, done_of(mine), None)
    done = done_of(make_finished(tmp_path, name="demo-tiny"))
    command._keep(console, done, None)
    assert store_of(mine.path).current().source == "mine: v1, seed 0"
    assert "which the demo does not replace. `bem promote" in console.file.getvalue()


def test_what_no_verdict_allows_is_not_put_into_use(console, tmp_path):
    folder = make_finished(tmp_path, name="demo-tiny", gates={"quality_margin": 50.0})
    done = done_of(folder)
    assert not any(verdict.accepted for verdict in done.result.verdicts.values())
    command._keep(console, done, None)
    said = console.file.getvalue()
    assert "No verdict on micro says PROMOTE, so nothing was put into use for it." in said
    assert not store_of(folder.path).path.exists()


@pytest.mark.skipif(
    not demos.SHOWN.is_there, reason="bem-smol was not made yet: bem/releases/bem-smol"
)
def test_the_second_half_is_whole(tmp_path):
    config = demos.of_release(demos.SHOWN, str(tmp_path), rows=4)
    assert config.name == "demo-bem-smol-4" and not config.trains
    assert config.routing.checkpoint == "bem-smol"
