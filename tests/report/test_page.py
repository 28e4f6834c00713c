"""The report says what was decided and why, in one file that needs nothing else."""

import json
import re
import shutil

import pytest

from bem.errors import CheckpointError
from bem.report import page as report
from bem.runs.folder import RunFolder
from tests.experiments.finished_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def html(run) -> str:
    return report.write(run.path).read_text(encoding="utf-8")


def test_it_needs_no_other_file(html):
    assert not re.search(r"""(src|href)=["'](?!#)""", html)
    assert "@import" not in html and "url(http" not in html


def test_every_candidate_has_its_decision_and_a_sentence_at_the_top(html):
    top = html[: html.index('id="effects"')]
    for arm, decision in {"v1": "PROMOTE", "v3": "REJECT", "v4": "INCONCLUSIVE"}.items():
        block = re.search(rf'class="decision {decision}">.*?</div>', top, re.DOTALL)
        assert block and f"</span>{arm}</span>" in block.group(0)
    assert "Better than s0: em +15.5 points [+12.9, +18.4]. All 12 gates passed." in top
    assert "more examples would decide" in top


def test_every_gate_is_shown_with_value_limit_and_state(html, run):
    verdicts = json.loads(run.verdicts.read_text())["candidates"]
    rows = re.findall(r'<td class="state (pass|fail|unknown)">', html)
    assert len(rows) == sum(len(v["checks"]) for v in verdicts.values())
    assert rows.count("fail") == sum(
        check["passed"] is False for v in verdicts.values() for check in v["checks"]
    )
    assert "×1.308" in html and "×1.150" in html


def test_every_gain_stands_beside_its_control(html):
    controls = html[html.index('id="controls"') : html.index('id="gates"')]
    assert "more than v1-random" in controls


def test_what_was_not_promoted_is_listed_with_its_reasons(html):
    refused = html[html.index('id="refused"') : html.index('id="training"')]
    assert "Failed: latency.decode: p50 ratio 1.308" in refused
    assert "v1 <span" not in refused


def test_the_figures_take_their_colours_from_the_page(html):
    figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(figures) == 3
    for figure in figures:
        assert "var(--arm-1)" in figure and "var(--ink)" in figure
        assert not re.search(r"#0a0[ab]0", figure)
    ids = [i for figure in figures for i in re.findall(r'<clipPath id="([^"]+)"', figure)]
    assert len(ids) == len(set(ids))  # inline figures share one name space


def test_predictions_are_shown_as_text(html):
    assert "&lt;b&gt;other&lt;/b&gt;" in html and "<b>other</b>" not in html


def test_it_says_how_to_repeat_the_run(html, run):
    assert "bem run configs/quickstart.yaml" in html
    assert f"bem run {run.path}/config.yaml --name finished-again" in html


def test_markdown_says_the_same(html, run):
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert "- **v1: PROMOTE.** Better than s0: em +15.5 points" in text
    assert text.count("| fail |") == html.count('class="state fail"')
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|"), line


def test_written_again_it_is_the_same(html, run):
    assert report.write(run.path).read_text(encoding="utf-8") == html


def test_it_can_be_written_without_predictions_and_curves(run, tmp_path):
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "finished"))
    for path in copy.path.rglob("*.jsonl"):
        path.unlink()
    text = report.write(copy.path).read_text(encoding="utf-8")
    assert 'id="training"' not in text and 'id="predictions"' not in text


def test_an_unfinished_run_has_no_report(run, tmp_path):
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "finished"))
    copy.latency.unlink()
    with pytest.raises(CheckpointError, match=r"No latency\.json"):
        report.write(copy.path)
    with pytest.raises(CheckpointError, match="is no run"):
        report.write(tmp_path)
