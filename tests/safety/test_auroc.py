"""The AUROC is the share of pairs in order, its interval DeLong's."""

import numpy as np
import pytest

from bem.errors import MeasurementError
from bem.safety.auroc import auroc


def test_it_is_the_share_of_pairs_in_order_with_ties_half():
    found = auroc([3, 2, 1], [2, 0])  # pairs: 3>2, 3>0, 2=2, 2>0, 1<2, 1>0
    assert found.value == pytest.approx(4.5 / 6)
    assert (found.positives, found.negatives) == (3, 2)


def test_the_variance_is_that_of_all_placements_counted_one_by_one():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.7, 1, 40), rng.normal(0, 1, 30)
    wins = (x[:, None] > y[None]).astype(float)
    error = np.sqrt(wins.mean(1).var(ddof=1) / 40 + wins.mean(0).var(ddof=1) / 30)
    found = auroc(x.tolist(), y.tolist())
    assert found.value == pytest.approx(wins.mean())
    assert found.ci_high - found.value == pytest.approx(1.959964 * error, rel=1e-5)


def test_too_few_scores_are_an_error():
    with pytest.raises(MeasurementError, match="two finite scores"):
        auroc([1.0], [0.0, 1.0])
    with pytest.raises(MeasurementError):
        auroc([1.0, float("nan")], [0.0, 1.0])
