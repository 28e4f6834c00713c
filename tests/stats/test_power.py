import pytest

from bem.stats.power import minimal_detectable_effect, more_examples


def test_mde_by_hand():
    assert minimal_detectable_effect(1.0) == pytest.approx(1.959964 + 0.841621, abs=1e-5)


def test_as_many_examples_again_as_the_effect_needs():
    # an effect equal to the MDE needs no more; half of it needs four times as many
    mde = minimal_detectable_effect(0.1)
    assert more_examples(mde, 0.1, 100) == 0
    assert more_examples(mde / 2, 0.1, 100) == 300


def test_more_of_the_same_cannot_turn_the_sign():
    assert more_examples(-0.1, 0.1, 100) is None
    assert more_examples(0.0, 0.1, 100) is None
