"""The tower that ships: it finds what is drawn, where it is drawn, and does not know what it was not made for."""

import numpy as np
import pytest
import torch

from bem.vision.eyes import Eyes
from bem.vision.scenes import Thing, draw, draw_scene
from bem.vision.tiny import FOLDER, PATCH, TinyTower
from bem.vision.truths import drawn_claim, is_true

SCENE = ((Thing("circle", "yellow", 10, 20, 20), Thing("square", "blue", 60, 70, 20)),
         (Thing("triangle", "black", 30, 30, 30),), ())  # fmt: skip


@pytest.fixture(scope="module")
def eyes():
    return Eyes(TinyTower())


def test_it_is_small_and_carries_a_card():
    assert (FOLDER / "model.safetensors").stat().st_size <= 2_000_000
    assert "Apache-2.0".lower() in (FOLDER / "README.md").read_text().lower()


def test_every_thing_is_found_in_the_patch_of_its_centre_and_nowhere_else(eyes):
    seen = eyes.tower.encode([draw(SCENE)])
    phrases = ["yellow circle", "blue square", "black triangle", "red circle", "dog"]
    support = eyes.tower.support(seen, phrases)[0]
    for at, (x, y) in enumerate([(20, 30), (70, 80), (195, 45)]):
        patch = y // PATCH * seen.grid[1] + x // PATCH
        assert support[patch, at] > 0.5 and int(support[:, at].argmax()) == patch
    assert support[:, 3].max() < 0.2 and support[:, 4].isnan().all()


def test_claims_of_fresh_scenes_are_mostly_judged_rightly(eyes):
    rng = np.random.default_rng(99)
    right = []
    for _ in range(30):
        scene = draw_scene(rng, 2)
        claim = drawn_claim(scene, "present", rng)
        record = eyes.look(draw(scene, rng), claim.text)
        right += [(c.probability > 0.5) == is_true(claim, scene) for c in record.claims]
    assert np.mean(right) > 0.85


def test_blank_noise_and_stripes_shut_the_gate_and_a_scene_opens_it(eyes):
    rng = np.random.default_rng(1)
    stripes = np.tile(np.arange(100) % 6 * 40, (100, 1))[..., None].repeat(3, -1).astype(np.uint8)
    for odd in (
        np.full((64, 64, 3), 120, np.uint8),
        rng.integers(0, 256, (90, 90, 3)).astype(np.uint8),
        stripes,
    ):
        assert eyes.look(odd).gate == 0
    assert eyes.look(draw(SCENE)).gate == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (35, 35), (104, 401), (2000, 900)])
def test_any_size_is_taken(eyes, size):
    seen = eyes.tower.encode([np.zeros((*size, 3), np.uint8)])
    assert seen.valid.any() and torch.isfinite(seen.strangeness).all()
