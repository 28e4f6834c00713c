import re

import numpy as np
import pytest

from bem.errors import DataError
from bem.report.plots.evidence import (
    Correctness,
    Interval,
    RerankerGain,
    Stairs,
    bins_of,
    reliability,
    reranker_gain,
    staircase,
)

MARGINS = np.linspace(0, 1, 80)
RIGHT = (MARGINS > 0.4).astype(float)


def around(value):
    return Interval(value, value - 0.05, value + 0.05)


STAIRS = Stairs(
    "v2",
    {c: around(v) for c, v in {"clean": 0.6, "corrupt": 0.4, "shuffled": 0.2, "off": 0.1}.items()},
    1,
)


def test_bins_share_out_all_examples_and_the_last_holds_its_edge():
    bins = bins_of([0.0, 0.24, 0.25, 0.9, 1.0], [1, 0, 1, 1, 0.5], n_bins=4)
    assert [(b.left, b.right, b.n) for b in bins] == [
        (0.0, 0.25, 2), (0.25, 0.5, 1), (0.5, 0.75, 0), (0.75, 1.0, 2),
    ]  # fmt: skip
    assert [b.correct and b.correct.value for b in bins] == [0.5, 1.0, None, 0.75]


@pytest.mark.parametrize(
    ("margins", "correct"),
    [([0.5], [1, 0]), ([np.nan], [1]), ([1.2], [1]), ([0.5], [50.0])],
    ids=["unpaired", "nan", "margin", "percent"],
)
def test_numbers_that_make_no_bins_are_refused(margins, correct):
    with pytest.raises(DataError):
        bins_of(margins, correct)


def test_reliability_shows_every_arm_and_every_count():
    arms = [Correctness("v1", RIGHT, 1), Correctness("v1-random", 1 - RIGHT, 2, control=True)]
    svg = reliability(MARGINS, arms)
    for text in ("v1", "v1-random", "share correct"):
        assert f">{text}</text>" in svg
    counts = [str(b.n) for b in bins_of(MARGINS, RIGHT)]
    assert [t for t in re.findall(r">(\d+)</text>", svg)] == counts


def test_the_staircase_names_its_conditions_and_leaves_out_those_not_measured():
    svg = staircase([STAIRS], "F1")
    for text in ("clean index", "corrupt index", "shuffled index", "no passages", "F1", "v2"):
        assert f">{text}</text>" in svg
    part = Stairs("v2", {c: STAIRS.scores[c] for c in ("clean", "shuffled")}, 1)
    svg = staircase([part])
    assert "clean index" in svg and "corrupt index" not in svg and "no passages" not in svg


def test_the_reranker_gain_states_each_paired_difference():
    gain = RerankerGain("qa", 278, around(0.7), around(0.8), Interval(0.1, 0.07, 0.13))
    loss = RerankerGain("hotpot", 321, around(0.8), around(0.7), Interval(-0.1, -0.13, 0.07))
    svg = reranker_gain([gain, loss], "tiny")
    for text in ("+0.100  [+0.070, +0.130]", "−0.100  [−0.130, +0.070]", "278 questions", "● tiny"):
        assert text in svg


def test_figures_take_their_colours_from_the_page_and_have_ids_of_their_own():
    arms = [Correctness("v1", RIGHT, 1)]
    gain = RerankerGain("qa", 5, around(0.7), around(0.8), around(0.1))
    figures = [reliability(MARGINS, arms), staircase([STAIRS]), reranker_gain([gain])]
    for svg in figures:
        assert svg.startswith("<svg") and "var(--arm-1)" in svg and "var(--ink)" in svg
        assert not re.search(r"#0a0[ab]0", svg)
    ids = [i for svg in figures for i in re.findall(r' id="([^"]+)"', svg) if "clip" in i]
    assert len(ids) == len(set(ids))
    assert figures[1] == staircase([STAIRS])  # drawn again it is the same
