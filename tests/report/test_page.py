"""The report says what was decided and why, in one file that needs nothing else."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml

from bem.errors import CheckpointError
from bem.files import read_json, write_json
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
    assert "Better than s0: em +15.5 points [+12.9, +18.4]. All 13 gates passed." in top
    assert "more examples would decide" in top


def test_gates_that_are_not_the_defaults_stand_beside_the_decisions(html, run):
    changes = (
        "Judged under gates other than the defaults: regression_margin_points 3 (default 0.5); "
        "slice_margin_points 5 (default 1); waived kv_hit (default none)."
    )
    assert changes in html[: html.index('id="effects"')]
    markdown = (run.path / "report.md").read_text(encoding="utf-8")
    assert changes in markdown[: markdown.index("## Effects")]


def test_it_says_which_layers_are_adapted_and_how_much_memory_each_arm_adds(html):
    assert "static LoRA, layers 1 to 3 of 4, counted from 0" in html
    assert "1.00 MiB (+6.2%)" in html


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


# ------------------------------------------------------------------------------- odd answers and runs


def test_a_report_is_made_without_torch():
    program = "import sys, bem.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


ODD = [
    "line\u2028and\u2029paragraph\x85",
    "\x00\x08\x1b[31mred",
    "half \ud83d",
    "</td></table><script>alert(1)</script>",
    "{{ page.name }} {% raw %} | a | b |\n\n# heading",
    "x" * 100_000,
    "",
]


def spoiled(run, tmp_path, odd: str) -> RunFolder:
    """A copy of the run in which every arm but the baseline answers the first rows oddly."""
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "finished"))
    for arm in copy.config.arms:
        path = copy.cell(arm.name, 0).predictions
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows[:8]:
            row |= {"input": odd, "references": [odd] if row["id"] != "forms/row1" else []}
            row["prediction"] = odd
            row["scores"]["quality"] = float(arm.role != "baseline")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    return copy


class Elements(HTMLParser):
    """Names of all elements, and whether each that opens also closes."""

    def __init__(self, text: str):
        super().__init__()
        self.names, self.open = set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_no_answer_can_disturb_the_report(run, html, tmp_path, odd):
    page = report.write(spoiled(run, tmp_path, odd).path)
    text = page.read_text(encoding="utf-8")
    assert Elements(text).names == Elements(html).names and not Elements(text).open
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", text)
    assert len(text) < len(html) + 80_000
    markdown = (page.parent / "report.md").read_text(encoding="utf-8")
    assert len(markdown.splitlines()) == len(markdown.split("\n"))


def test_answers_are_shown_as_they_are_or_by_the_names_of_their_characters(run, tmp_path):
    text = report.write(spoiled(run, tmp_path, "a\x1b\u2028\ud83d<i>").path).read_text()
    shown = text[text.index('id="predictions"') :]
    assert "a⟨U+001B⟩⟨U+2028⟩⟨U+D83D⟩&lt;i&gt;" in shown
    assert '<td class="text">(empty)</td>' in shown  # a question without a right answer


def test_a_run_of_the_baseline_alone_has_a_report_that_claims_nothing(tmp_path):
    alone = make_run(tmp_path, arms=[{"name": "s0", "role": "baseline"}])
    text = report.write(alone.path).read_text(encoding="utf-8")
    assert "Nothing was compared with s0" in text and 'class="decision' not in text


def test_what_was_not_timed_is_missing_in_the_report_too(run, tmp_path):
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "finished"))
    timings = read_json(copy.latency)
    del timings["latency_ms"]["v1"], timings["adapter_memory_bytes"]["v1"]
    write_json(copy.latency, timings)
    page = report.page_of(copy)
    row = next(arm.price for arm in page.arms if arm.name == "v1")
    assert row[-3:] == ["–", "–", "–"]


def test_the_search_for_learning_rates_is_shown(run, tmp_path):
    """Losses of every rate, what was chosen, and the step that was kept."""
    copy = RunFolder(tmp_path / "tuned")
    shutil.copytree(run.path, copy.path)
    config = run.config.model_dump(mode="json")
    config["data"]["validation_rows"] = 8
    config["tuning"] = {"rates": [0.001, 0.004], "steps": 8}
    (copy.path / "config.yaml").write_text(yaml.safe_dump(config))
    trials = [
        {"rate": 0.001, "steps": 8, "loss": 1.5},
        {"rate": 0.004, "steps": 8, "loss": None},
    ]
    write_json(copy.tuning / "s0.json", {"trials": trials, "chosen": 0.001})
    manifest = copy.cell("s0", 0).checkpoint / "manifest.json"
    write_json(manifest, {**read_json(manifest, CheckpointError), "extra": {"step": 60}})
    html = report.write(copy.path).read_text(encoding="utf-8")
    row = r"<td>s0</td>.*1\.500</td>.*diverged</td>\s*<td[^>]*>0\.001</td><td[^>]*>60"
    assert re.search(row, html, re.DOTALL)
    assert "| s0 | 1.500 | diverged | 0.001 | 60" in (copy.path / "report.md").read_text()
