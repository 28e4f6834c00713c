import numpy as np
import pytest

from bem.stats.laws import EmpiricalLaw, LatticeLaw, as_lattice
from bem.stats.saddlepoint import SaddlepointLaw
from bem.stats.weights import Statistic, resample

SHAPES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "skewed": lambda rng, n: rng.lognormal(size=n),
    "heavy": lambda rng, n: rng.standard_t(5, size=n),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [20, 50, 400])
def test_quantiles_agree_with_monte_carlo(shape, n):
    x = SHAPES[shape](np.random.default_rng(n), n)
    law = SaddlepointLaw(x)
    drawn = resample([Statistic("x", x[:, None], lambda s: s[..., 0] / n)], 40_000, seed=0)[:, 0]
    monte_carlo = EmpiricalLaw(drawn)
    for p in (0.01, 0.025, 0.2, 0.5, 0.9, 0.975):
        noise = 4 * np.sqrt(p * (1 - p) / 40_000)
        assert monte_carlo.mid(law.lower(p)) == pytest.approx(p, abs=noise + 0.006)


def test_tails_agree_with_the_exact_law_of_a_fine_lattice():
    values = np.random.default_rng(1).integers(0, 40, 80) / 40
    exact, law = LatticeLaw(as_lattice(values)), SaddlepointLaw(values)
    for z in (-5, -3, -1, 0.5, 2, 4):
        x = values.mean() + z * values.std() / np.sqrt(80)
        assert law.at_most(x) == pytest.approx(exact.mid(x), rel=0.15, abs=1e-9)


def test_quantile_inverts_the_distribution_function():
    law = SaddlepointLaw(np.random.default_rng(0).lognormal(size=100))
    for p in (1e-6, 0.025, 0.3, 0.8, 0.9999):
        assert law.at_most(law.lower(p)) == pytest.approx(p, rel=1e-6)


def test_the_smallest_score_is_an_atom_and_nothing_lies_beyond():
    values = np.repeat([0.0, 1.0, 1.7], [10, 6, 4])
    law = SaddlepointLaw(values)
    assert law.at_most(0.0) == pytest.approx(0.5**20)
    assert law.at_most(-0.1) == 0.0
    assert law.at_least(1.7) == pytest.approx(0.2**20)
    assert law.at_most(1.7) == 1.0
