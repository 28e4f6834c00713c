import numpy as np
import pytest

from bem.errors import DataError
from bem.stats.bootstrap import bca_bootstrap, joint_bca
from bem.stats.engines import law_of, mean_of
from bem.stats.weights import Statistic, ratio


@pytest.mark.parametrize(
    ("values", "engine"),
    [
        (np.tile([0.0, 1.0, -1.0], 30), "exact"),
        (np.tile([0.0, 1 / 3, -2 / 3], 30), "exact"),
        (np.random.default_rng(0).normal(size=100), "saddlepoint"),
        (np.random.default_rng(0).normal(size=15), "weights"),
        (np.append(np.random.default_rng(0).normal(size=99) * 1e-3, 50.1), "weights"),
        (np.append(np.zeros(90), np.random.default_rng(0).normal(size=10)), "weights"),
    ],
    ids=["em", "em over seeds", "smooth", "few", "one dominates", "nearly all equal"],
)
def test_the_engine_fits_the_data(values, engine):
    assert bca_bootstrap(values, 200).engine == engine


def test_a_slice_of_single_examples_is_a_plain_mean():
    columns = np.array([[1.0, 1.0], [0.0, 0.0], [3.0, 1.0]])
    assert mean_of(Statistic("slice", columns, ratio)).tolist() == [1.0, 3.0]
    assert mean_of(Statistic("clusters", np.array([[1.0, 1.0], [2.0, 3.0]]), ratio)) is None


def test_engines_that_do_not_fit_say_so():
    with pytest.raises(DataError, match="discrete"):
        bca_bootstrap([0.1, np.pi, 2.0], engine="exact")
    with pytest.raises(DataError, match="plain mean"):
        law_of(None, 100, 0, "saddlepoint")
    with pytest.raises(ValueError, match="auto, exact"):
        bca_bootstrap([0.0, 1.0], engine="fast")


def test_resamples_without_a_value_are_left_out_and_said():
    mask = np.zeros(40)
    mask[:2] = 1.0
    x = np.arange(40.0)
    statistic = Statistic("tiny", np.stack([x * mask, mask], 1), ratio)
    assert "undefined_resamples" in joint_bca([statistic], 500, engine="weights")[0].flags
