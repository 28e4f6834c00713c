from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bem.stats.laws import EmpiricalLaw, LatticeLaw, as_lattice
from bem.stats.saddlepoint import SaddlepointLaw

scores = st.lists(st.integers(-3, 3), min_size=2, max_size=5).filter(lambda x: len(set(x)) > 1)


def enumerated(values):
    return np.array([np.mean(draw) for draw in product(values, repeat=len(values))])


@settings(max_examples=40, deadline=None)
@given(scores)
def test_the_lattice_law_is_the_enumerated_bootstrap(values):
    values = np.array(values) / 2
    law, means = LatticeLaw(as_lattice(values)), enumerated(values)
    for x in np.unique(np.round(means, 12)):
        assert law.at_most(x) == pytest.approx((means <= x + 1e-9).mean(), abs=1e-12)
        assert law.at_least(x) == pytest.approx((means >= x - 1e-9).mean(), abs=1e-12)
    middle = ((means < -1e-9).mean() + (means <= 1e-9).mean()) / 2
    assert law.mid(0.0) == pytest.approx(middle, abs=1e-12)


def test_the_lattice_law_of_em_is_binomial_far_into_the_tail():
    from scipy.stats import binom

    law = LatticeLaw(as_lattice(np.repeat([0.0, 1.0], [900, 100])))
    for k in (60, 100, 150):
        assert law.at_most(k / 1000) == pytest.approx(binom.cdf(k, 1000, 0.1), rel=1e-8, abs=1e-13)
        assert law.at_least(k / 1000) == pytest.approx(
            binom.sf(k - 1, 1000, 0.1), rel=1e-6, abs=1e-13
        )


def laws():
    rng = np.random.default_rng(0)
    return [
        EmpiricalLaw(np.round(rng.normal(size=999), 1)),
        LatticeLaw(as_lattice(rng.choice([-1.0, 0.0, 1.0], size=40))),
        SaddlepointLaw(rng.lognormal(size=60)),
    ]


@pytest.mark.parametrize("law", laws(), ids=["empirical", "lattice", "saddlepoint"])
@pytest.mark.parametrize("p", [0.003, 0.025, 0.4, 0.9])
def test_quantiles_and_tails_are_dual(law, p):
    low, high = law.lower(p), law.upper(1 - p)
    step = 1e-3 if isinstance(law, SaddlepointLaw) else 2 * law.eps + 1e-9
    assert law.at_most(low - step) <= p < law.at_most(low + step) + 1e-9
    assert law.at_least(high + step) <= p < law.at_least(high - step) + 1e-9


def test_ties_count_half():
    law = EmpiricalLaw(np.array([0.0, 1.0, 1.0 + 1e-9, 2.0]))
    assert law.mid(1.0) == 0.5
    assert law.at_most(1.0) == 4 / 5  # three values and the observed one of five


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([0, 1, -1], 1.0),
        ([0, 1 / 3, 2 / 3], 1 / 3),
        ([0, 2, 4], 2.0),
        ([1, 3], 2.0),
        ([0, 4, 10], 2.0),
        ([0, 100, 201], 1.0),
        ([0.1 + 0.2, 0.3, 1.3], 1.0),
        ([0, 1e-9, 3e-9], 1e-9),
        ([1e5, 1e5 + 0.25, 1e5 + 1], 0.25),
        ([7, 7], 1.0),
    ],
)
def test_discrete_scores_are_recognised_in_any_unit_and_at_any_offset(values, step):
    lattice = as_lattice(np.array(values, dtype=float))
    assert lattice.step == pytest.approx(step)
    assert lattice.offset + lattice.codes * lattice.step == pytest.approx(
        np.array(values), rel=1e-9
    )


def test_a_grid_through_zero_says_where_zero_lies():
    lattice = as_lattice(np.array([-0.5, 0.0, 1.25]))
    assert (lattice.step, lattice.start) == (0.25, -2)


def test_continuous_scores_are_not():
    assert as_lattice(np.array([0.0, np.pi, 1.0])) is None
    assert as_lattice(np.random.default_rng(0).normal(size=100)) is None
