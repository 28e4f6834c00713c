"""The report's part on routing says what the numbers show, and leaves out what a run does not have."""

import re
import shutil

import numpy as np
import pytest

from bem.config import GatesConfig
from bem.experiments.measuring.answers import DECLARED
from bem.files import read_json
from bem.report import claims as report_claims
from bem.report import page as report
from bem.report import words as wording
from bem.report.claims import closed, gain
from bem.report.sections import learning as report_learning
from bem.report.sections import router as report_router
from bem.report.sections import routing as report_routing
from bem.report.words import Difference
from bem.runs.folder import RunFolder
from bem.runs.verdicts import measurements, read_verdicts
from bem.stats.measurement import Measurement
from tests.experiments import finished_run, routed_run

GATES = GatesConfig(n_bootstrap=200)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    return routed_run.make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def html(run) -> str:
    whole = report.write(run.path).read_text(encoding="utf-8")
    return whole[whole.index('id="routing"') : whole.index('id="gates"')]


@pytest.fixture(scope="module")
def page(run) -> report.Page:
    return report.page_of(run)


def measured(name, quality, **changes) -> Measurement:
    ids = [f"row{i}" for i in range(len(quality))]
    return Measurement(name, {"quality": quality}, ids, declared=DECLARED, **changes)


# ------------------------------------------------------------------------------------- differences


@pytest.mark.parametrize("part", [None, "sticky"])
def test_differences_to_the_baseline_are_those_of_the_verdicts(run, part):
    judgement, sides = read_verdicts(run.verdicts).judgement, measurements(run, run.config)
    for name, verdict in {**judgement.candidates, **judgement.controls}.items():
        effect = verdict.effect("quality", part)
        difference = gain(sides[name], sides["s0"], run.config.gates, part)
        expected = [100 * effect.gain, 100 * effect.ci_low, 100 * effect.ci_high]
        assert difference
        assert [difference.value, difference.low, difference.high] == pytest.approx(
            expected, rel=1e-5
        )


def test_the_share_of_the_gap_is_the_ratio_of_the_mean_gains():
    base, oracle = np.zeros(60), np.repeat([1.0, 0.0], 30)
    half = np.tile([1.0, 0.0], 15).tolist() + [0.0] * 30
    share = closed(measured("a", half), measured("s0", base), measured("o", oracle), GATES)
    assert share.value == pytest.approx(50.0)
    assert 20 < share.low < 50 < share.high < 80
    same = closed(measured("a", oracle), measured("s0", base), measured("o", oracle), GATES)
    assert (same.low, same.value, same.high) == (100.0, 100.0, 100.0)


def test_an_arm_that_diverged_has_no_difference():
    broken = measured("a", [1.0, float("nan")])
    assert gain(broken, measured("s0", [0.0, 0.0]), GATES) is None


# --------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.5, 2.0, "a is better than b: +1.0 points [+0.5, +2.0]"),
        (-0.5, 2.0, "a shows no detectable difference from b: +1.0 points [−0.5, +2.0]"),
        (0.0, 2.0, "a shows no detectable difference from b: +1.0 points [+0.0, +2.0]"),
        (-3.0, -0.1, "a is worse than b: +1.0 points [−3.0, −0.1]"),
    ],
)
def test_a_comparison_claims_no_more_than_its_interval(low, high, said):
    assert wording.compared("a", "b", Difference(1.0, low, high)) == said


def test_a_ratio_of_times_has_its_limits_or_says_why_not():
    assert wording.times(2.1, 2.02, 2.19) == "×2.10 [2.02, 2.19]"
    assert wording.times(2.1, 0.0, float("inf")) == "×2.10 (too few rounds for limits)"


def test_the_sentences_answer_the_questions_of_a_router(page):
    said = page.routing.sentences
    assert re.match(r"ar1 is better than s0: .*; ar1 takes ×1\.02 .* of the time of s0", said[0])
    assert said[1].startswith("ar1 is better than ar0: ")
    assert re.fullmatch(r"ar1 closes \d+ % \[\d+, \d+\] of the gap from s0 to oracle, .*", said[2])
    assert said[3].startswith("ar1 is better than linear where the last turn shows no cue: ")
    assert said[4].startswith("ar1 is better than encoder where the last turn shows no cue: ")
    assert re.search(r"xlora takes ×2\.1\d .* of the time of ar1 in prefill, ×1[67]\.\d+", said[5])


def test_without_a_certain_gap_nothing_is_closed():
    rng = np.random.default_rng(0)
    base, oracle = rng.random(40), rng.random(40)
    sides = [measured(n, q) for n, q in (("ar1", base), ("s0", base), ("oracle", oracle))]
    (said,) = report_claims._gap(sides[0], sides[1], sides[2], GATES)
    assert "no certain gap" in said and "closes" not in said


# -------------------------------------------------------------------------------- what is on show


def test_every_arm_stands_beside_the_others_with_quality_and_price(page, run):
    rows = {row.arm: row for row in page.routing.rows}
    assert list(rows) == [arm.name for arm in run.config.arms]
    assert page.routing.qualities == ["quality", "sticky"]
    assert [difference for _, difference in rows["s0"].qualities] == ["baseline"] * 2
    assert re.fullmatch(r"\+\d+\.\d \[\+\d+\.\d, \+\d+\.\d\]", rows["ar1"].qualities[0][1])
    costs = dict(zip(page.routing.costs, rows["xlora"].costs, strict=True))
    assert costs["KV hits"] == "0.0%" and re.fullmatch(r"×1[67]\.\d\d", costs["decode p50"])
    assert rows["s0"].costs[1].endswith(" ms")


def test_plain_ways_to_choose_tell_how_often_they_are_right_where_no_cue_is_shown(page):
    part = page.routing.router
    shown = {row.arm: dict(zip(part.columns, row.values, strict=True)) for row in part.choosing}
    for name in ("linear", "encoder"):
        assert shown[name]["right expert at answers"] == "75.0%"
        assert shown[name]["right where it shows no cue"] == "12.5%"
    assert shown["ar1"]["right where it shows no cue"] == ""


def test_the_heat_map_outlines_what_was_executed_and_tells_what_was_asked(page):
    talk = page.routing.router.conversations[0]
    assert [chunk.skill for chunk in talk.chunks] == ["", "forms/intent", "qa", "", "forms/json"]
    assert [c.right for c in talk.chunks if c.turn] == [True, True, False]
    marked = {name: [cell.marked for cell in cells] for name, cells in talk.rows}
    assert marked["qa"] == [False, False, True, True, True]
    assert talk.chunks[3].action == "rank 1, ×1.5, faded 25%"


def test_experts_that_never_come_into_question_have_no_row(page):
    names = [name for name, _ in page.routing.router.conversations[0].rows]
    assert names == ["base", "intent", "qa"]  # json has a hundredth everywhere


def test_a_conversation_that_lost_its_first_turns_keeps_the_skills_of_the_last():
    chunks = [{"turn": turn} for turn in (False, True, False, True)]
    assert report_router._asked(chunks, ["a", "b", "c"]) == ["", "b", "", "c"]
    assert report_router._asked(chunks[:1], ["a"]) == [""]


def test_the_matrix_counts_all_seeds_and_outlines_the_skill_s_own_expert(page):
    use = page.routing.router.use
    row = dict(use.rows)["forms/json (81)"]
    assert [cell.text for cell in row] == ["", "61", "20", ""]
    assert [cell.marked for cell in row] == [False, True, False, False]
    assert row[1].shade == pytest.approx(61 / 81)


def test_an_expert_that_loses_more_than_the_limit_stands_out(page, html):
    rows = {row.expert: row.beside for row in page.routing.router.losses}
    assert rows["json"] == [("1.000 (+0.0%)", True), ("1.010 (+1.0%)", True)]
    assert rows["qa"] == [("1.000 (+0.0%)", True), ("1.030 (+3.0%)", False)]
    assert len(re.findall(r'class="number fail">', html)) == 1 and "red beyond 2%" in html


def test_refused_steps_and_alarms_are_told_in_words(page):
    remarks = page.routing.learning.remarks
    assert remarks[0] == (
        "Seed 0: 1 of 15 steps refused (iteration 4), the policy stayed as it was. "
        "The last one: no candidate kept KL <= 0.01."
    )
    assert remarks[2].endswith("collapsed (iterations 9, 10, 13): qa governs 96% of the chunks.")
    assert report_learning._numbers([1, 2, 3, 7]) == "iterations 1 to 3, 7"


def test_cloning_stands_against_chance_and_the_most_frequent_choice(page):
    heads = {head.name: head.values for head in page.routing.learning.heads}
    assert heads["expert"] == ["25.0%", "80.0% (50.0%, 120)", "78.0% (50.0%, 120)"]


def test_the_section_needs_no_script_and_no_other_file(html):
    assert "<script" not in html and not re.search(r"""(src|href)=["'](?!#)""", html)
    assert len(re.findall("<svg", html)) == 4
    assert '<td class="turn marked"' in html and "forms/intent → qa → forms/json" in html
    assert "&#34;AddToPlaylist&#34;" in html  # what a model read is text, not markup


def test_markdown_tells_the_same(run, html, page):
    text = (run.path / "report.md").read_text(encoding="utf-8")
    for sentence in page.routing.sentences:
        assert f"- {sentence}" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|"), line
    part = text[text.index("## Routing") : text.index("## Gates")]
    tables = re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE)
    assert len(tables) == 8
    for table in tables:
        pipes = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(pipes) == 1, table


def test_written_again_it_is_the_same(run):
    first = report.write(run.path).read_bytes()
    assert report.write(run.path).read_bytes() == first


# ---------------------------------------------------------------------------------- what is missing


def test_a_run_without_routes_has_no_such_part(tmp_path):
    config = finished_run.make_config(tmp_path)
    assert report_routing.part_of(RunFolder(tmp_path), config, {}, {}) is None


def test_what_the_folder_does_not_hold_is_left_out(run, tmp_path):
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "routed"))
    shutil.rmtree(copy.path / "routing")
    for path in copy.path.rglob("route.json"):
        path.unlink()
    text = report.write(copy.path).read_text(encoding="utf-8")
    assert 'id="routing"' in text and "Quality by skill" in text
    for title in ("in a conversation", "answers which skill", "AR1 learned", "copies the oracle"):
        assert title not in text


def test_without_ar1_the_cloned_router_is_shown(tmp_path):
    folder = routed_run.make_run(tmp_path, ("s0", "ar0", "gold"))
    part = report.page_of(folder).routing
    assert part and part.router.shown == "ar0" and not part.learning.curves
    assert [s.split(":")[0] for s in part.sentences] == ["ar0 is better than s0"]
    assert read_json(folder.cell("ar0", 0).path / "route.json")["accuracy"] and part.learning.heads


def test_controls_alone_are_compared_without_sentences(tmp_path):
    folder = routed_run.make_run(tmp_path, ("s0", "gold", "random"))
    part = report.page_of(folder).routing
    assert part and part.ranking and not part.sentences and not part.router.conversations
    assert 'id="routing"' in report.write(folder.path).read_text(encoding="utf-8")
