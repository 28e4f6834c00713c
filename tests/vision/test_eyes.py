"""From a picture and a text to the numbers a router is told: hand-computed, and gated."""

import numpy as np
import pytest
import torch
from scipy.stats import poisson_binom

from bem.config import VISION_FEATURES
from bem.errors import ConfigError
from bem.vision.eyes import Eyes, count_probability
from tests.vision.oracle import ColourTower, tiles

EYES = Eyes(ColourTower())
NOTHING = (0.0,) * len(VISION_FEATURES)


def test_a_claim_that_holds_is_covered_and_explains_its_patch():
    seen = EYES.look(tiles("red", "", "", "blue"), "There is a red thing.")
    assert (seen.gate, seen.why, seen.certainty, seen.coverage) == (1.0, "", 1.0, 1.0)
    assert (seen.explained, seen.things) == (0.5, 2)
    told = dict(zip(VISION_FEATURES, seen.features(), strict=True))
    assert told["gate"] == 1 and told["claims"] == 0.25 and told["things"] == 0.125
    assert [told[f"concept_{n}"] for n in range(1, 6)] == [0, 0, 1, 1, 0]  # blue and red


def test_a_claim_that_does_not_hold_shuts_the_gate():
    seen = EYES.look(tiles("red", "", "", "blue"), "There is a red thing. There is a green thing.")
    assert (
        seen.gate == 0 and seen.conflict == 1 and seen.why.startswith("conflict: 'there is a green")
    )
    assert seen.features() == NOTHING
    assert [claim.probability for claim in seen.claims] == [1.0, 0.0]


def test_swapping_two_pictures_raises_the_conflict_of_both():
    pictures = [tiles("red", ""), tiles("", "blue")]
    texts = ["There is a red thing.", "There are no red things and one blue thing."]
    right, swapped = EYES.look_at(pictures, texts), EYES.look_at(pictures[::-1], texts)
    assert [r.conflict for r in right] == [0, 0] and [s.conflict for s in swapped] == [1, 1]
    assert all(s.features() == NOTHING for s in swapped)


@pytest.mark.parametrize("text", ["", "There is a red thing."])
def test_no_picture_a_blank_and_a_strange_one_are_all_nothing(text):
    checkers = np.indices((40, 40)).sum(0) % 2 * 255
    strange = np.repeat(checkers[..., None], 3, -1).astype(np.uint8)
    for picture, why in ((None, "no picture"), (tiles("", ""), "blank"), (strange, "unlike")):
        seen = EYES.look(picture, text)
        assert seen.gate == 0 and seen.why.startswith(why) and seen.features() == NOTHING


def test_words_that_the_tower_does_not_know_neither_support_nor_contradict():
    seen = EYES.look(tiles("red", ""), "There is a purple dog. There is a red thing.")
    assert [claim.probability for claim in seen.claims] == [None, 1.0]
    assert seen.gate == 1 and seen.coverage == 1


def test_a_relation_is_that_of_places():
    picture = tiles("red", "", "", "blue")
    for text, p in (
        ("a red thing is left of a blue thing", 1),
        ("a red thing is below a blue thing", 0),
    ):
        assert EYES.look(picture, text).claims[0].probability == p


@pytest.mark.parametrize("broken", ["raises", "nan"])
def test_a_tower_that_fails_shuts_the_gate_and_says_so(broken):
    class Broken(ColourTower):
        def support(self, features, phrases):
            if broken == "raises":
                raise RuntimeError("out of memory")
            return super().support(features, phrases) * float("inf") * 0

    seen = Eyes(Broken()).look(tiles("red", ""))
    assert seen.gate == 0 and seen.why.startswith("error") and seen.features() == NOTHING


def test_counts_are_poisson_binomial():
    chances = torch.tensor([0.9, 0.5, 0.2, 0.05, 0.0])
    of = poisson_binom(chances.tolist())
    for least, most in ((1, 1 << 20), (0, 0), (2, 2), (1, 3), (3, 1 << 20), (0, 2), (4, 4)):
        wanted = of.cdf(min(most, 5)) - (of.cdf(least - 1) if least else 0)
        assert count_probability(chances, least, most) == pytest.approx(wanted, abs=1e-9)
    assert count_probability(torch.ones(40), 20, 1 << 20) == pytest.approx(1)


def test_limits_are_checked():
    class Wordy(ColourTower):
        concepts = tuple("abcdefghijklmnopq")

    with pytest.raises(ConfigError, match="16"):
        Eyes(Wordy())
    with pytest.raises(ConfigError, match="conflict"):
        Eyes(ColourTower(), conflict=1.0)
