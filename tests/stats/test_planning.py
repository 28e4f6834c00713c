import numpy as np
import pytest

from bem.config import GatesConfig
from bem.errors import ConfigError, DataError
from bem.stats import Measurement, Metric
from bem.stats.effects import default_family
from bem.stats.planning import (
    Goal,
    Spread,
    assumed_spread,
    measured_spread,
    promote_probability,
    rows_to_promote,
    rows_to_reject,
)
from tests.stats.test_guards import decisions, draw

GATES = GatesConfig()
TEN_POINTS = Spread(examples=100.0, seeds=0.0)  # a standard deviation of 10 points


def test_rows_to_promote_by_hand():
    # ((1.96 + 0.8416) * 10 / 2)^2
    assert rows_to_promote(Goal(2.0), TEN_POINTS, 1, GATES) == 197
    margin = GATES.model_copy(update={"quality_margin": 1.0})
    assert rows_to_promote(Goal(2.0), TEN_POINTS, 1, margin) == 785
    assert rows_to_promote(Goal(2.0, hypotheses=4), TEN_POINTS, 1, GATES) > 197


def test_rows_to_reject_a_useless_candidate_by_hand():
    assert rows_to_reject(TEN_POINTS, 1, GATES) == 785  # its upper limit falls below 1 point


def test_a_gain_within_the_margin_is_never_promoted():
    assert rows_to_promote(Goal(0.0), TEN_POINTS, 1, GATES) is None
    margin = GATES.model_copy(update={"quality_margin": 2.0})
    assert rows_to_promote(Goal(2.0), TEN_POINTS, 1, margin) is None


def test_seeds_help_against_their_own_noise_alone():
    half = Spread(examples=50.0, seeds=50.0)
    assert half.per_row(1) == 100.0 and half.per_row(5) == 60.0
    assert rows_to_promote(Goal(2.0), half, 5, GATES) == pytest.approx(0.6 * 197, abs=1)
    assert rows_to_promote(Goal(2.0), TEN_POINTS, 5, GATES) == 197


def test_clusters_need_as_many_rows_more_as_their_design_effect():
    # four examples of a document, correlated by .5: 1 + 3 * .5
    spread = assumed_spread(0.5, 0.7, 3.0, cluster_size=4, cluster_correlation=0.5)
    assert spread.design_effect == 2.5
    single = rows_to_promote(Goal(3.0), assumed_spread(0.5, 0.7, 3.0), 1, GATES)
    assert rows_to_promote(Goal(3.0), spread, 1, GATES) == pytest.approx(2.5 * single, abs=3)


def test_the_assumed_spread_is_that_of_answers_of_uniform_difficulty():
    old, new, _ = draw([0], 200_000, 0, 3.0)
    variance = 1e4 * np.var(new - old)
    assert assumed_spread(0.5, 0.7, 3.0).per_row(1) == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize(
    "numbers",
    [(0.0, 0.7, 3), (1.0, 0.7, 3), (50.0, 0.7, 3), (0.5, 1.0, 3), (0.5, np.nan, 3)],
)
def test_impossible_assumptions_are_refused(numbers):
    with pytest.raises(ConfigError, match="must lie between"):
        assumed_spread(*numbers)
    with pytest.raises(ConfigError, match="cluster_size"):
        assumed_spread(0.5, 0.7, 3, cluster_size=0.5)


def test_the_measured_spread_holds_seeds_and_clusters():
    rng = np.random.default_rng(0)
    document = np.repeat(rng.normal(0, 0.1, 500), 4)
    old = 0.5 + rng.normal(0, 0.05, (3, 2000))
    new = (0.5 + document + rng.normal(0, 0.05, (3, 2000))).clip(0, 1)
    ids, labels = [str(i) for i in range(2000)], [f"d{i // 4}" for i in range(2000)]
    sides = [Measurement(n, {"em": s}, ids, clusters=labels) for n, s in (("s0", old), ("v1", new))]
    spread = measured_spread(*sides, "em")
    assert spread.examples == pytest.approx(100, rel=0.15)
    assert spread.seeds == pytest.approx(50, rel=0.1)
    assert 3 < spread.design_effect < 4  # four copies of the document, less the noise of seeds


def test_a_metric_without_points_cannot_be_planned():
    ids = [str(i) for i in range(30)]
    arm = Measurement("s0", {"ms": np.ones(30)}, ids, declared={"ms": Metric(False, None)})
    assert default_family(arm) == ("ms",)
    with pytest.raises(DataError, match="ms has no score per example in points"):
        measured_spread(arm, arm, "ms")


def test_slices_too_small_to_judge_are_never_promoted():
    assert promote_probability(190, Goal(50.0, slices=10), TEN_POINTS, 1, GATES) == 0.0


@pytest.mark.parametrize(("n", "k"), [(500, 0), (500, 10), (1000, 5)])
def test_the_foretold_chance_is_that_of_the_verdict(n, k):
    spread = assumed_spread(0.5, 0.7, 4.0)
    foretold = promote_probability(n, Goal(4.0, slices=k), spread, 1, GATES)
    promoted = decisions(60, n, k, 4.0).count("PROMOTE") / 60
    assert promoted == pytest.approx(foretold, abs=0.16)  # 2.5 standard errors
