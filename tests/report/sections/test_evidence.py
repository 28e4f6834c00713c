"""The report's part on evidence."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from bem.report.sections.evidence import _reciprocal, correlation, part_of
from tests.experiments.finished_run import make_run


def test_the_correlation_is_spearman_s_with_an_interval_around_it():
    rng = np.random.default_rng(0)
    x = rng.random(80)
    y = x + rng.normal(0, 0.5, 80)
    text = correlation(x, y).replace("\u2212", "-")
    value, interval = text.split(" [")
    low, high = map(float, interval.rstrip("]").split(", "))
    assert float(value) == pytest.approx(spearmanr(x, y).statistic, abs=0.006)
    assert low < float(value) < high


def test_the_interval_of_the_correlation_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth = 6 / np.pi * np.arcsin(0.6 / 2)  # Spearman of a normal pair with Pearson 0.6
    hits = 0
    for _ in range(300):
        x = rng.normal(size=100)
        y = 0.6 * x + 0.8 * rng.normal(size=100)
        low, high = correlation(x, y).replace("\u2212", "-").split(" [")[1].rstrip("]").split(", ")
        hits += float(low) <= truth <= float(high)
    assert 0.91 <= hits / 300 <= 0.99


def test_gates_that_never_move_have_no_correlation():
    assert correlation(np.arange(10.0), np.ones(10)) == "none (constant)"


def test_a_gold_passage_that_was_not_found_has_reciprocal_rank_zero():
    assert _reciprocal([1, 0, 4]).tolist() == [1.0, 0.0, 0.25]


def test_a_run_without_retrieval_has_no_such_part(tmp_path):
    folder = make_run(tmp_path)
    assert part_of(folder, folder.config, {}, {}) is None
