from itertools import permutations, product

import numpy as np
import pytest
from scipy.stats import page_trend_test, rankdata, spearmanr

from bem.config import GatesConfig
from bem.errors import DataError
from bem.stats import bca_bootstrap
from bem.stats.monotone import index_swap, page_test, trend

GATES = GatesConfig(n_bootstrap=1000)


def falling(n=60, by=0.2, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    hard = rng.random(n)
    names = ("clean", "corrupt", "shuffled")
    return {name: hard - i * by + noise * rng.random(n) for i, name in enumerate(names)}


def test_scores_that_fall_with_the_index_are_monotone():
    found = index_swap(falling(), gates=GATES)
    assert [(s.better, s.worse, s.passed) for s in found.steps] == [
        ("clean", "corrupt", True),
        ("corrupt", "shuffled", True),
    ]
    assert found.monotone is True
    assert found.spearman > 0.5 and found.p_value < 1e-6
    assert found.n == 60


def test_a_step_is_the_bca_interval_of_the_paired_difference():
    scores = falling()
    step = index_swap(scores, gates=GATES).steps[0]
    bca = bca_bootstrap(scores["clean"] - scores["corrupt"], GATES.n_bootstrap)
    assert (step.difference, step.ci_low, step.ci_high) == pytest.approx(
        (bca.observed, bca.lower, bca.upper)
    )


def test_clusters_are_resampled_whole():
    weak = falling(n=40, by=0.05)
    scores = {name: np.repeat(row, 5) for name, row in weak.items()}
    labels = np.repeat(np.arange(40), 5)
    clustered = index_swap(scores, labels, GATES)
    single = index_swap(weak, gates=GATES)
    assert clustered.n == 40
    for one, other in zip(clustered.steps, single.steps, strict=True):
        assert one.reason == other.reason
    assert clustered.p_value == single.p_value  # copies of an example are no further evidence
    assert clustered.p_value > index_swap(scores, gates=GATES).p_value


def test_seeds_are_averaged_within_an_example():
    scores = falling()
    seeds = {name: np.stack([row - 0.1, row + 0.1]) for name, row in scores.items()}
    assert index_swap(seeds, gates=GATES).steps[0].difference == pytest.approx(
        index_swap(scores, gates=GATES).steps[0].difference
    )


def test_an_index_that_does_not_matter_passes_no_trend():
    equal = {name: np.arange(30.0) for name in falling()}
    found = index_swap(equal, gates=GATES)
    assert [s.passed for s in found.steps] == [True, True]
    assert (found.spearman, found.p_value, found.monotone) == (0.0, 1.0, None)


def test_retrieval_off_is_set_against_the_clean_index_beside_the_steps():
    scores = falling()
    found = index_swap({**scores, "off": scores["corrupt"]}, gates=GATES)
    steps = found.steps[0]
    assert (found.ablation.better, found.ablation.worse) == ("clean", "off")
    assert (found.ablation.difference, found.ablation.ci_low) == (steps.difference, steps.ci_low)
    assert found.means["off"] == pytest.approx(scores["corrupt"].mean())
    without = index_swap(scores, gates=GATES)
    assert without.ablation is None
    assert (without.steps, without.monotone) == (found.steps, found.monotone)


def test_better_scores_on_a_worse_index_are_not_monotone():
    scores = falling()
    found = index_swap({**scores, "shuffled": scores["clean"] + 0.5}, gates=GATES)
    assert [s.passed for s in found.steps] == [True, False]
    assert found.monotone is False


def test_a_small_rise_within_noise_is_open():
    rng = np.random.default_rng(1)
    clean = rng.random(50)
    worse = clean + rng.normal(0.01, 0.3, 50)
    worse += 0.01 + clean.mean() - worse.mean()
    found = index_swap({"clean": clean, "corrupt": worse, "shuffled": worse - 0.5}, gates=GATES)
    assert [s.passed for s in found.steps] == [None, True]
    assert found.monotone is None


@pytest.mark.parametrize("left", [("clean",), ("clean", "shuffled"), ()])
def test_what_was_not_measured_is_open(left):
    scores = {name: row for name, row in falling().items() if name in left}
    found = index_swap(scores, gates=GATES)
    assert found.monotone is found.spearman is found.p_value is None
    assert [s.passed for s in found.steps] == [None, None]
    assert set(found.means) == set(left)


def test_scores_of_different_examples_are_open():
    scores = falling()
    found = index_swap({**scores, "clean": scores["clean"][:50]}, gates=GATES)
    assert [s.passed for s in found.steps] == [None, True]
    assert found.monotone is found.p_value is None


def test_too_few_examples_decide_nothing():
    found = index_swap(falling(n=GATES.min_items - 1), gates=GATES)
    assert found.monotone is None
    assert "at least 20" in found.steps[0].reason


def test_nan_is_refused_with_its_place():
    scores = falling()
    scores["corrupt"][7] = np.nan
    with pytest.raises(DataError, match=r"index_swap.corrupt\[7\]"):
        index_swap(scores)


def test_the_trend_is_the_mean_spearman_correlation():
    table = np.random.default_rng(0).integers(0, 4, (200, 3)).astype(float)
    table = table[np.ptp(table, axis=1) > 0]
    expected = np.mean([spearmanr(row, [3, 2, 1]).statistic for row in table])
    assert trend(table) == pytest.approx(expected)
    assert trend(np.array([[3.0, 2.0, 1.0], [5.0, 5.0, 5.0]])) == 0.5


@pytest.mark.parametrize("shape", [(5, 3), (10, 3), (6, 4), (4, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_the_trend_test_is_scipys_exact_one_where_nothing_is_tied(shape, seed):
    table = np.random.default_rng(seed).random(shape)
    order = np.arange(shape[1], 0, -1)
    expected = page_trend_test(table, predicted_ranks=order, method="exact")
    assert page_test(table) == pytest.approx(expected.pvalue, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_with_ties_its_law_is_that_of_all_reorderings(seed):
    table = np.random.default_rng(seed).integers(0, 2, (5, 3)).astype(float)
    ranks = rankdata(table, axis=1)
    laws = [[3 * a + 2 * b + c for a, b, c in permutations(row)] for row in ranks]
    observed = (ranks @ [3, 2, 1]).sum()
    sums = [sum(parts) for parts in product(*laws)]
    expected = np.mean(np.array(sums) >= observed - 1e-9)
    assert page_test(table) == pytest.approx(expected, rel=1e-9)


def test_on_exact_match_scores_it_finds_what_the_law_without_ties_misses():
    table = np.zeros((200, 3))
    table[:12, 0] = 1  # right only with the clean index
    order = [3, 2, 1]
    assert page_test(table) < 1e-3
    assert page_trend_test(table, predicted_ranks=order, method="asymptotic").pvalue > 0.05


def test_it_rejects_a_true_null_as_often_as_stated():
    rng = np.random.default_rng(0)
    tables = rng.random((400, 40, 3)) < 0.4
    rejected = np.mean([page_test(t.astype(float)) <= 0.05 for t in tables])
    assert 0.02 <= rejected <= 0.08


def test_many_rows_are_quick_and_far_tails_have_a_floor():
    table = np.tile([3.0, 2.0, 1.0], (5_000, 1))
    assert page_test(table) == 1e-12
    assert page_test(table[:, ::-1]) == pytest.approx(1.0)


def noise(rng, n=60):
    return {name: rng.random(n) for name in ("clean", "corrupt", "shuffled")}


def test_a_step_passes_by_its_lower_limit_not_by_its_estimate():
    rng = np.random.default_rng(5)
    clean = rng.random(60)
    worse = clean - 0.01 + 0.3 * rng.normal(size=60)
    worse += clean.mean() - 0.02 - worse.mean()  # lower by .02, give or take .04
    step = index_swap({"clean": clean, "corrupt": worse}, gates=GATES).steps[0]
    assert step.difference == pytest.approx(0.02) and step.ci_low < 0
    assert step.passed is None


def test_pure_noise_is_hardly_ever_monotone():
    rng = np.random.default_rng(0)
    passed = [index_swap(noise(rng), gates=GATES).monotone is True for _ in range(200)]
    assert sum(passed) <= 4  # steps at 2.5 % each, and the trend; 18 % when the estimates decided


def test_clusters_of_very_unequal_size_decide_nothing():
    sizes = np.maximum(1, (300 / np.arange(1, 31) ** 1.6).astype(int))
    labels = np.repeat(np.arange(30), sizes)
    swap = index_swap(falling(n=len(labels)), labels, GATES)
    assert swap.monotone is None and swap.follows is False
    assert "of equal size" in swap.steps[0].reason
