"""The figures of routing name what they show and take their colours from the page."""

import re

import pytest

from bem.report.plots.routing import RankedArm, cloning, expert_use, learning, ranking
from bem.report.words import Difference

CLEAR, OPEN = Difference(2.0, 1.0, 3.0), Difference(0.1, -1.0, 1.2)
ARMS = [
    RankedArm("oracle", {"all": CLEAR, "sticky": CLEAR}, 3, control=True),
    RankedArm("ar1", {"all": OPEN, "sticky": None}, 1),
]


def rows(count: int, options: int = 3, refused: tuple[int, ...] = ()):
    return [
        {
            "iteration": i, "reward": 0.1 * i, "reward_se": 0.05, "kl": 0.0 if i in refused else 0.006,
            "accepted": i not in refused, "entropy": 2.0, "expert_use": [1 / options] * options,
        }
        for i in range(1, count + 1)
    ]  # fmt: skip


HEADS = [{"head": h, "accuracy": 0.8, "majority": 0.5, "chance": 0.25} for h in ("expert", "span")]


def marks(svg: str) -> int:
    return svg.count("<use")


def test_the_ranking_has_a_panel_per_part_and_a_row_per_arm():
    svg = ranking(ARMS, "s0")
    for text in ("all", "sticky", "oracle", "ar1", "quality above s0 (points)"):
        assert f">{text}</text>" in svg


def test_what_could_not_be_computed_has_no_mark():
    known = ranking([ARMS[0], RankedArm("ar1", {"all": OPEN, "sticky": OPEN}, 1)], "s0")
    assert "ar1" in ranking(ARMS, "s0")
    assert known.count("var(--arm-1)") > ranking(ARMS, "s0").count("var(--arm-1)")


def test_learning_names_seeds_and_the_limit_and_marks_refused_steps():
    svg = learning({0: rows(6), 5: rows(6)}, 0.01)
    for text in ("seed 0", "seed 5", "limit 0.01", "reward", "KL of the step", "entropy (nats)"):
        assert f">{text}</text>" in svg
    assert (
        marks(learning({0: rows(6, refused=(2, 5))}, 0.01))
        == marks(learning({0: rows(6)}, 0.01)) + 2
    )


@pytest.mark.filterwarnings("error")
def test_one_iteration_and_no_refusal_can_be_drawn():
    assert "seed 0" in learning({0: rows(1)}, 0.01)


def test_expert_use_names_every_option_and_has_a_panel_per_seed():
    svg = expert_use({0: rows(4), 1: rows(4)}, ["base", "json", "qa"])
    for text in ("base", "json", "qa", "iteration, seed 0", "iteration, seed 1"):
        assert f">{text}</text>" in svg
    assert ">others</text>" not in svg


def test_of_many_experts_the_most_used_have_an_area_of_their_own():
    many = rows(4, options=40)
    for row in many:
        row["expert_use"] = [0.5 / 39] * 39 + [0.5]
    svg = expert_use({0: many}, ["base", *(f"expert{i}" for i in range(1, 40))])
    assert ">expert39</text>" in svg and ">others</text>" in svg
    assert len(re.findall(r">(?:base|expert\d+|others)</text>", svg)) == 12


def test_use_over_a_single_iteration_is_no_area():
    assert expert_use({0: rows(1)}, ["base", "json", "qa"]) == ""
    assert expert_use({}, ["base"]) == ""


def test_cloning_marks_every_head_and_seed():
    svg = cloning({0: HEADS, 1: HEADS})
    assert ">expert</text>" in svg and ">span</text>" in svg
    assert (
        marks(svg) - marks(cloning({0: HEADS})) == 6
    )  # accuracy, majority and chance of two heads


def test_figures_take_their_colours_from_the_page_and_have_ids_of_their_own():
    use = expert_use({0: rows(3)}, ["base", "json", "qa"])
    figures = [ranking(ARMS, "s0"), learning({0: rows(3)}, 0.01), use, cloning({0: HEADS})]
    for svg in figures:
        assert svg.startswith("<svg") and "var(--arm-1)" in svg and "var(--ink)" in svg
        assert not re.search(r"#0a0[ab]0", svg)
    ids = [i for svg in figures for i in re.findall(r' id="([^"]+)"', svg) if "clip" in i]
    assert len(ids) == len(set(ids))
    assert figures[0] == ranking(ARMS, "s0")  # drawn again it is the same
