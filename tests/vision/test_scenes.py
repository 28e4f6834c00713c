"""Scenes are drawn where they say, and what is said of them is true of their things."""

import numpy as np
import pytest

from bem.errors import DataError
from bem.vision.claims import Claim, claims_in
from bem.vision.scenes import BOX_GREY, COLOURS, Thing, draw, draw_scene, scene_of, width_of
from bem.vision.truths import KINDS, drawn_claim, is_true


def test_a_square_covers_exactly_its_pixels():
    picture = draw(((Thing("square", "red", 10, 20, 15),), (), ()))
    assert picture.shape == (100, 400, 3) == (100, width_of(3), 3)
    red = (picture == COLOURS["red"]).all(-1)
    assert red.sum() == 225 and red[20:35, 10:25].all()
    assert (picture[:, :100][~red[:, :100]] == BOX_GREY).all()


def test_a_circle_and_a_triangle_cover_their_share():
    for shape, share in (("circle", np.pi / 4), ("triangle", 0.5)):
        picture = draw(((Thing(shape, "black", 0, 0, 30),),))
        ink = (BOX_GREY - picture[:30, :30, 0].astype(float)) / BOX_GREY
        assert ink.mean() == pytest.approx(share, abs=0.01)


def test_the_same_seed_draws_the_same_and_things_do_not_overlap():
    one, other = (draw_scene(np.random.default_rng(5), 3) for _ in range(2))
    assert one == other
    for box in one:
        taken = np.zeros((100, 100), int)
        for t in box:
            taken[t.y : t.y + t.size, t.x : t.x + t.size] += 1
        assert taken.max(initial=0) <= 1


def test_rows_of_nlvr_are_read_and_odd_ones_refused():
    (box,) = scene_of([[["square", "#0099ff", 40, 80, 20], ["circle", "Black", 1, 2, 10]]])
    assert box == (Thing("square", "blue", 40, 80, 20), Thing("circle", "black", 1, 2, 10))
    for odd in ([[["star", "red", 1, 2, 3]]], [[["circle", "red"]]], [[3]]):
        with pytest.raises(DataError):
            scene_of(odd)


def test_truth_is_that_of_the_things():
    scene = ((Thing("circle", "red", 0, 0, 10), Thing("square", "blue", 50, 50, 10)),
             (Thing("circle", "red", 0, 0, 10),))  # fmt: skip
    told = {
        "there are exactly two red circles": True,
        "there is a red square": False,
        "there is no triangle": True,
        "there are at least 4 things": False,
        "a red circle is left of a blue square": True,
        "a blue square is above a red circle": False,
        "a red circle is right of a blue square": True,  # the one in the second box
    }
    assert {text: is_true(claims_in(text)[0], scene) for text in told} == told
    assert is_true(Claim("", "red thing", 2, 2), scene)


def test_drawn_claims_are_written_so_that_they_are_read_again_and_both_truths_occur():
    rng = np.random.default_rng(0)
    for kind in KINDS:
        truths = set()
        for _ in range(60):
            scene = draw_scene(rng, 2)
            claim = drawn_claim(scene, kind, rng)
            assert claims_in(claim.text) == [claim]
            truths.add(is_true(claim, scene))
        assert truths == {True, False}, kind
