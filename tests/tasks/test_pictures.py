"""Rows with pictures: the sign of a skill is there and alone, and controls show what they say."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from bem.config import VISION_FEATURES
from bem.errors import DataError
from bem.tasks.pictures import (
    SIGNS,
    _signed,
    pictures_for,
    read_omniglot,
    rows_with_images,
    scene_of_row,
    sighted,
)  # fmt: skip
from bem.training.example import Example, data_hash
from bem.vision.eyes import Eyes
from tests.vision.oracle import ColourTower, tiles

EYES = Eyes(ColourTower())


def test_of_all_signs_a_picture_holds_that_of_its_skill_once():
    rng = np.random.default_rng(0)
    for skill in [*range(len(SIGNS))] * 8:
        names = [thing.name for thing in _signed(SIGNS[skill], SIGNS, rng)]
        assert [name for name in names if name in SIGNS] == [SIGNS[skill]]


def test_shuffled_pictures_are_the_same_ones_and_controls_hold_nothing():
    skills = [0, 1, 2, 3] * 3
    shown, mixed = (pictures_for(skills, c, 1) for c in ("shown", "shuffled"))
    key = lambda p: p.tobytes()  # noqa: E731
    assert sorted(map(key, shown)) == sorted(map(key, mixed)) and list(map(key, shown)) != list(
        map(key, mixed)
    )
    assert pictures_for(skills, "none", 1) == [None] * 12
    assert all(np.ptp(p) == 0 for p in pictures_for(skills, "blank", 1))
    assert all(p.std() > 60 for p in pictures_for(skills, "noise", 1))
    assert all(map(np.array_equal, shown, pictures_for(skills, "shown", 1)))
    with pytest.raises(DataError, match="no sign"):
        pictures_for([7], "shown", 1)


def test_rows_are_told_what_is_seen_and_others_keep_their_hash():
    rows = [Example("a", "There is a red thing.", ("x",)), Example("b", "Go on.", ("x",))]
    told = sighted(rows, [tiles("red", ""), None], EYES)
    assert (
        told[0].vision == EYES.look(tiles("red", ""), rows[0].input).features()
        and told[0].vision[0] == 1
    )
    assert told[1] == rows[1] and data_hash(told[1:]) == data_hash(rows[1:])
    assert data_hash(told) != data_hash(rows)
    with pytest.raises(DataError, match="vision must be 24"):
        Example("c", "x", (), vision=(1.0,))


def test_scenes_of_nlvr_and_drawings_of_omniglot(tmp_path):
    row = Example("n", "x", ("true",), meta={"boxes": [[["square", "blue", 1, 2, 20]]]})
    assert scene_of_row(row)[0][0].name == "blue square"
    with pytest.raises(DataError, match="vision_nlvr"):
        scene_of_row(Example("n", "x", ()))
    ink = np.random.default_rng(0).random((2, 35, 35)) < 0.1
    named = {"alphabet": ["Greek", "Latin"], "character": ["c1", "c2"], "drawer": [1, 2]}
    np.savez(tmp_path / "o.npz", bits=np.packbits(ink, axis=2), **named)
    one, other = read_omniglot(tmp_path / "o.npz")
    assert (one.alphabet, one.character, one.drawer, other.drawer) == ("Greek", "c1", 1, 2)
    assert np.array_equal(one.picture[..., 0] == 0, ink[0]) and one.picture.shape == (35, 35, 3)
    with pytest.raises(DataError, match="no vision_omniglot"):
        read_omniglot(tmp_path / "none.npz")


def test_images_of_rows_are_files_beside_them_or_data_urls(tmp_path):
    picture, out = tiles("red", ""), io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    (tmp_path / "p.png").write_bytes(out.getvalue())
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    said = "There is a red thing."
    rows = [
        {"prompt": said, "label": "a", "image": "p.png"},
        {"messages": [{"role": "user", "content": said}], "label": "a", "image": url},
        {"prompt": said, "label": "a"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other, bare = rows_with_images(path, EYES)
    assert one["vision"] == other["vision"] == list(EYES.look(picture, said).features())
    assert len(one["vision"]) == len(VISION_FEATURES) and "image" not in one and bare == rows[2]
    for odd in ("none.png", 3, "data:image/png;base64,AAAA"):
        path.write_text(json.dumps({"prompt": "x", "image": odd}) + "\n")
        with pytest.raises(DataError, match=r"rows.jsonl:1"):
            rows_with_images(path, EYES)
