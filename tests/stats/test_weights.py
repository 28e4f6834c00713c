import numpy as np
import pytest
from scipy.stats import binom, chisquare

from bem.stats import weights
from bem.stats.weights import Statistic, ratio, resample, weight_blocks


def all_weights(n, times, seed=0):
    return np.concatenate([block.copy() for block in weight_blocks(n, times, seed)])


@pytest.mark.parametrize("n", [1, 2, 30, 199, 200, 1000])
def test_every_row_draws_n_units(n):
    table = all_weights(n, 300)
    assert table.shape == (300, n)
    assert (table.sum(axis=1) == n).all()


@pytest.mark.parametrize("n", [50, 400])
def test_counts_of_a_unit_are_binomial(n):
    table = all_weights(n, 4000)
    seen = np.bincount(table.ravel(), minlength=6)
    expected = binom.pmf(np.arange(5), n, 1 / n)
    observed = np.append(seen[:5], seen[5:].sum())
    expected = np.append(expected, 1 - expected.sum()) * table.size
    assert chisquare(observed, expected).pvalue > 1e-3


def test_units_are_negatively_correlated_as_in_a_multinomial():
    table = all_weights(250, 20_000).astype(float)
    pairs = (table[:, :-1] * table[:, 1:]).mean() - 1  # E[w_i w_j] - 1 = -1/n
    assert pairs == pytest.approx(-1 / 250, abs=0.002)


@pytest.mark.parametrize("n", [50, 400])
def test_same_seed_same_weights_and_another_seed_others(n):
    assert (all_weights(n, 700, 5) == all_weights(n, 700, 5)).all()
    assert (all_weights(n, 700, 5) != all_weights(n, 700, 6)).any()


def test_the_answer_does_not_depend_on_what_else_is_resampled_or_buffered(monkeypatch):
    x = np.random.default_rng(0).normal(size=(500, 3))
    mean = [Statistic(str(j), x[:, [j]], lambda sums: sums[..., 0] / 500) for j in range(3)]
    together = resample(mean, 1500, seed=1)
    alone = resample(mean[1:2], 1500, seed=1)[:, 0]
    monkeypatch.setattr(weights, "BUFFER_ROWS", 64)
    rebuffered = resample(mean, 1500, seed=1)
    assert alone == pytest.approx(together[:, 1], abs=1e-5 * x.std() / np.sqrt(500))
    assert rebuffered == pytest.approx(together, abs=1e-5 * x.std() / np.sqrt(500))


def test_float32_sums_are_right_beside_a_large_offset():
    x = np.random.default_rng(0).normal(size=(300, 1)) + 1e6
    drawn = resample([Statistic("x", x, lambda sums: sums[..., 0])], 50, seed=2)[:, 0]
    exact = all_weights(300, 50, 2).astype(float) @ x[:, 0]
    assert drawn == pytest.approx(exact, rel=0, abs=1e-4)


def test_discrete_data_get_the_resamples_of_any_other_data():
    rng = np.random.default_rng(0)
    total = lambda sums: sums[..., 0]  # noqa: E731
    discrete = Statistic("em", rng.choice([0.0, 1.0, -1.0], (900, 1), p=[0.7, 0.2, 0.1]), total)
    smooth = Statistic("f1", rng.normal(size=(900, 1)), total)
    alone = resample([discrete], 400, seed=3)[:, 0]
    together = resample([discrete, smooth], 400, seed=3)[:, 0]
    assert alone == pytest.approx(
        all_weights(900, 400, 3).astype(float) @ discrete.columns[:, 0], abs=1e-2
    )
    assert alone == pytest.approx(together, abs=1e-2)


def test_a_slice_that_is_not_drawn_has_no_mean():
    assert np.isnan(ratio(np.array([[0.0, 0.0]]))).all()
    assert ratio(np.array([[3.0, 2.0]])).tolist() == [1.5]


@pytest.mark.parametrize("rate", [0.86, 0.98, 0.9999])
def test_the_split_law_adds_up_to_poissons(rate):
    from scipy.stats import poisson

    steps, last, rest = weights._split_poisson(rate)
    whole = np.diff([0, *steps.astype(int), int(last)]) / 256
    others = np.diff([0, *rest.astype(int), 65536]) / 65536 * (1 - int(last) / 256)
    total = np.zeros(30)
    total[: whole.size] += whole
    total[: others.size] += others
    assert total == pytest.approx(poisson.pmf(np.arange(30), rate), abs=2.0**-22)
