import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from bem.errors import DataError
from bem.stats.fdr import benjamini_hochberg_correction, holm

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def test_adjusted_p_by_hand():
    found = benjamini_hochberg_correction([0.5, 0.03, 0.001, 0.04], alpha=0.05)
    assert found.adjusted_p_values == pytest.approx([0.5, 0.16 / 3, 0.004, 0.16 / 3])
    assert found.rejected.tolist() == [False, False, True, False]
    assert found.fcr_level == pytest.approx(0.05 / 4)


def test_step_up_rescues_p_values_below_a_later_success():
    found = benjamini_hochberg_correction([0.04, 0.045, 0.049])
    assert found.rejected.all()
    assert found.fcr_level == pytest.approx(0.05)


@given(p_values, st.sampled_from(["bh", "by"]))
def test_equal_to_scipy(p, method):
    ours = benjamini_hochberg_correction(p, method=method).adjusted_p_values
    assert ours == pytest.approx(false_discovery_control(p, method=method), abs=1e-12)


@given(p_values, st.randoms())
def test_order_does_not_matter(p, random):
    order = list(range(len(p)))
    random.shuffle(order)
    straight = benjamini_hochberg_correction(p).adjusted_p_values
    shuffled = benjamini_hochberg_correction([p[i] for i in order]).adjusted_p_values
    assert shuffled == pytest.approx(straight[order])


@given(p_values)
def test_adjusted_p_and_rejection_agree_and_by_is_stricter(p):
    bh, by = (benjamini_hochberg_correction(p, method=m) for m in ("bh", "by"))
    assert (bh.rejected == (bh.adjusted_p_values <= 0.05)).all()
    assert (bh.adjusted_p_values >= np.array(p) - 1e-15).all()
    assert (by.adjusted_p_values >= bh.adjusted_p_values - 1e-15).all()


def test_nan_and_impossible_p_are_refused():
    with pytest.raises(DataError, match=r"p_values\[1\] is nan"):
        benjamini_hochberg_correction([0.1, float("nan")])
    with pytest.raises(DataError, match=r"p_values\[0\] is 1.5"):
        benjamini_hochberg_correction([1.5])
    with pytest.raises(ValueError, match="alpha"):
        benjamini_hochberg_correction([0.5], alpha=0)


@pytest.mark.parametrize("m", range(1, 40))
@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.1])
def test_p_values_on_the_boundary_are_rejected_however_they_are_rounded(m, alpha):
    k = np.arange(1, m + 1)
    for p in (alpha * k / m, alpha / m * k, np.full(m, alpha)):
        discoveries = benjamini_hochberg_correction(p, alpha=alpha)
        assert discoveries.rejected.all()
        assert (discoveries.adjusted_p_values <= alpha).all()
    assert not benjamini_hochberg_correction(alpha * k / m * (1 + 1e-9), alpha=alpha).rejected.any()


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]).size == 0
