import pytest
from scipy.stats import binomtest

from bem.stats.shares import wilson


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 10), (50, 50), (123, 400)])
def test_the_interval_of_a_share_is_wilsons(k, n):
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high))
