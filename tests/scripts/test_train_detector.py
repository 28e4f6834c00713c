"""Training the violation detector: contrast pairs, the lexicon and the conformal limit, by hand-computed cases."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from detector_pairs import contrast_pairs, harmful, harmless
from train_detector import clean, conformal_limit, lexicon

from bem.safety.detector import word_digest


def test_pairs_are_different_on_both_sides_and_the_same_for_one_seed():
    good, bad = contrast_pairs(500, seed=3)
    assert len(set(good)) == len(set(bad)) == 500
    assert not set(harmless()) & set(harmful())
    assert (good, bad) == contrast_pairs(500, seed=3) != contrast_pairs(500, seed=4)


def test_of_n_exchangeable_scores_the_limit_leaves_alpha_above():
    scores = [i / 100 for i in range(99)]  # ceil(100 * 0.95) = 95th smallest
    assert conformal_limit(scores, 0.05) == 0.94
    assert conformal_limit([0.1, 0.2], 0.01) == 0.2  # too few for the level: the largest


def test_a_word_is_listed_that_hardly_occurs_elsewhere():
    abusive = ["grobble you"] * 50 + ["you there"] * 50
    listed = lexicon(abusive, ["you are kind"] * 10, ["kind words"])
    assert set(listed) == {word_digest("grobble")} | ({word_digest("there")})
    assert lexicon(abusive, [], ["a grobble is a hat"]).keys() == {
        word_digest(w) for w in ("you", "there")
    }


def test_the_marks_of_a_tweet_are_taken_off():
    assert clean("RT @ada: see #bread at http://example.org &amp; smile") == "see bread at & smile"
