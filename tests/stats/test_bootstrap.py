import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from bem.errors import DataError
from bem.stats.bootstrap import bca_bootstrap, joint_bca
from bem.stats.weights import Statistic, ratio


def continuous(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.lognormal(0, 1, n) - 1.4


def em_differences(n, seed=0, gain=0.1):
    return np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], p=[0.06, 0.94 - gain, gain], size=n)


@pytest.mark.parametrize("engine", ["saddlepoint", "weights"])
@pytest.mark.parametrize("n", [250, 1000])
def test_agrees_with_scipy_on_continuous_data(engine, n):
    x = continuous(n)
    ours = bca_bootstrap(x, 40_000, engine=engine)
    theirs = stats.bootstrap(
        (x,), np.mean, n_resamples=40_000, batch=200, rng=0
    ).confidence_interval
    se = x.std() / np.sqrt(n)
    assert ours.lower == pytest.approx(theirs.low, abs=0.12 * se)
    assert ours.upper == pytest.approx(theirs.high, abs=0.12 * se)


def test_agrees_with_arch_on_continuous_data():
    bootstrap = pytest.importorskip("arch.bootstrap", reason="arch is an optional oracle")
    x = continuous(300)
    theirs = bootstrap.IIDBootstrap(x, seed=1).conf_int(np.mean, reps=10_000, method="bca").ravel()
    ours = bca_bootstrap(x)
    assert [ours.lower, ours.upper] == pytest.approx(theirs, abs=0.15 * x.std() / np.sqrt(300))


def test_the_formula_step_by_step():
    x = em_differences(400)
    got = bca_bootstrap(x)
    d = x.mean() - (x.sum() - x) / 399
    d -= d.mean()
    a = -(d**3).sum() / (6 * (d**2).sum() ** 1.5)  # leaving a large one out lowers the mean
    assert got.engine == "exact"
    assert got.acceleration == pytest.approx(-a)
    # the ideal z0 of a mean is its acceleration to first order
    assert got.bias_correction == pytest.approx(got.acceleration, abs=2e-3)
    level = stats.norm.cdf(
        got.bias_correction
        + (got.bias_correction - 1.959964)
        / (1 - got.acceleration * (got.bias_correction - 1.959964))
    )
    from bem.stats.laws import LatticeLaw, as_lattice

    assert got.lower == LatticeLaw(as_lattice(x)).lower(level)


def test_exact_and_weights_engines_agree_within_a_lattice_step():
    x = em_differences(500)
    exact, drawn = bca_bootstrap(x), bca_bootstrap(x, engine="weights")
    assert drawn.lower == pytest.approx(exact.lower, abs=2.1 / 500)
    assert drawn.upper == pytest.approx(exact.upper, abs=2.1 / 500)
    assert drawn.p_value == pytest.approx(exact.p_value, rel=0.3, abs=0.002)


def test_ties_do_not_bias_z0():
    x = np.repeat([-1.0, 0.0, 1.0], [8, 83, 9])  # strict `<` gives about -0.1 here
    assert abs(bca_bootstrap(x, engine="weights").bias_correction) < 0.05
    assert abs(bca_bootstrap(x, engine="exact").bias_correction) < 0.01


@pytest.mark.parametrize("engine", ["auto", "weights"])
def test_swapping_the_sides_mirrors_the_interval(engine):
    x = em_differences(200, seed=3)
    one, two = bca_bootstrap(x, engine=engine), bca_bootstrap(-x, engine=engine)
    assert two.lower == pytest.approx(-one.upper, abs=2.1 / 200 if engine == "weights" else 1e-12)
    assert two.p_greater == pytest.approx(one.p_less, abs=0.01 if engine == "weights" else 1e-12)


data = st.one_of(
    st.lists(st.integers(-2, 2), min_size=3, max_size=60),
    st.lists(st.floats(-5, 5, width=16), min_size=3, max_size=60),
)


@settings(max_examples=80, deadline=None)
@given(
    data,
    st.sampled_from([-0.5, 0.0, 0.3]),
    st.sampled_from(["auto", "weights"]),
    st.floats(0.01, 0.3),
)
def test_the_p_value_is_the_interval_inverted(values, margin, engine, alpha):
    got = bca_bootstrap(values, 999, alpha, margin=margin, engine=engine)
    assume(not got.degenerate and "few_resamples" not in got.flags)
    assume(
        min(abs(got.lower - margin), abs(got.upper - margin)) > 1e-6 or got.engine != "saddlepoint"
    )
    outside = got.lower > margin or got.upper < margin
    assert outside == (got.p_value <= alpha * (1 + 1e-9))
    assert (got.lower > margin) == (got.p_greater <= alpha / 2 * (1 + 1e-9))


@settings(max_examples=60, deadline=None)
@given(data, st.sampled_from(["auto", "weights"]))
def test_limits_are_ordered_and_inside_the_data(values, engine):
    got = bca_bootstrap(values, 500, engine=engine)
    slack = 1e-6 * (1 + max(map(abs, values)))
    assert min(values) - slack <= got.lower <= got.upper <= max(values) + slack
    assert 0 < got.p_value <= 1
    assert all(np.isfinite([got.bias_correction, got.acceleration, got.se]))


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_equal_differences_are_flagged_and_never_significant(value):
    got = bca_bootstrap(np.full(50, value))
    assert got.flags == ("degenerate",)
    assert (got.lower, got.upper, got.p_value) == (pytest.approx(value), pytest.approx(value), 1.0)
    assert not got.significant


def test_a_single_example_is_degenerate():
    assert bca_bootstrap([0.7]).degenerate


def test_a_resample_always_on_one_side_is_clamped_not_nan():
    x = np.zeros(60)
    x[0] = 1.0
    got = bca_bootstrap(x)
    assert np.isfinite([got.lower, got.upper, got.bias_correction]).all()
    assert not got.significant


def test_a_correction_beyond_its_pole_is_dropped_and_said():
    got = bca_bootstrap([0.0, 0.0, 0.0, 1.0], alpha=0.001)  # t_3 is so far out that 1 - a z < 0
    assert "acceleration_dropped" in got.flags
    assert (got.lower, got.upper) == (0.0, 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_are_refused_with_their_index(bad):
    with pytest.raises(DataError, match=r"paired_scores\[3\]"):
        bca_bootstrap([0.0, 1.0, 0.5, bad])


@pytest.mark.parametrize("engine", ["auto", "weights"])
def test_same_seed_same_answer_and_the_global_generator_is_left_alone(engine):
    x = continuous(700)
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    one, two = (bca_bootstrap(x, seed=4, engine=engine) for _ in range(2))
    assert one == two
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_another_seed_moves_only_the_monte_carlo_engines():
    x = continuous(700)
    assert bca_bootstrap(x, seed=1, engine="weights") != bca_bootstrap(x, seed=2, engine="weights")
    assert bca_bootstrap(x, seed=1) == bca_bootstrap(x, seed=2)


def test_small_samples_are_widened_as_hesterberg_says():
    x = np.random.default_rng(0).normal(size=21)
    got = bca_bootstrap(x, 40_000)
    assert "small_sample" in got.flags
    reach = stats.t.ppf(0.975, 20) * np.sqrt(21 / 20) * x.std() / np.sqrt(21)
    assert (got.upper - got.lower) / 2 == pytest.approx(reach, rel=0.06)
    assert "small_sample" not in bca_bootstrap(continuous(200)).flags


def test_seeds_are_averaged_before_resampling():
    x = np.random.default_rng(0).normal(size=(3, 90))
    assert bca_bootstrap(x) == bca_bootstrap(x.mean(axis=0))


def test_clusters_of_copies_count_once():
    x = continuous(80)
    doubled = bca_bootstrap(np.repeat(x, 2), clusters=np.repeat(np.arange(80), 2))
    assert doubled == bca_bootstrap(x)
    assert doubled.n == 80


def test_unequal_clusters_resample_a_ratio():
    rng = np.random.default_rng(0)
    clusters = np.sort(rng.integers(0, 60, 300))
    x = rng.normal(size=300) + rng.normal(size=60)[clusters]
    clustered, naive = bca_bootstrap(x, clusters=clusters), bca_bootstrap(x)
    assert clustered.engine == "weights"
    assert clustered.observed == pytest.approx(naive.observed)
    groups = [x[clusters == c] - x.mean() for c in np.unique(clusters)]
    se = np.sqrt(sum(g.sum() ** 2 for g in groups)) / 300  # Miller 2024
    assert clustered.se == pytest.approx(se, rel=0.05)
    assert clustered.upper - clustered.lower > 1.3 * (naive.upper - naive.lower)


def test_metrics_variants_and_slices_share_one_resample():
    x = continuous(600)
    mask = np.arange(600) % 3 == 0
    whole = Statistic("whole", np.stack([x, np.ones(600)], 1), ratio)
    part = Statistic("part", np.stack([x * mask, mask.astype(float)], 1), ratio)
    together = joint_bca([whole, part, whole], seed=2, engine="weights")
    assert together[0].lower == together[2].lower
    assert together[0].lower == pytest.approx(
        bca_bootstrap(x, seed=2, engine="weights").lower, abs=1e-5
    )
    alone = bca_bootstrap(x[mask])
    assert together[1].observed == pytest.approx(x[mask].mean())
    assert together[1].upper == pytest.approx(alone.upper, abs=0.2 * alone.se)


def test_medians_are_resampled_by_index():
    x = continuous(150)
    got = bca_bootstrap(x, 2000, statistic=lambda s: np.median(s, axis=-1))
    assert got.engine == "gather"
    assert got.lower < np.median(x) < got.upper
    with pytest.raises(DataError, match="last axis"):
        bca_bootstrap(x, 100, statistic=np.mean)


def test_the_same_bootstrap_can_be_read_at_another_level():
    x = continuous(400)
    assert bca_bootstrap(x).at(0.01) == bca_bootstrap(x, alpha=0.01)
    assert bca_bootstrap(x).at(0.05, margin=0.1) == bca_bootstrap(x, margin=0.1)


def test_few_resamples_cannot_claim_a_small_p():
    got = bca_bootstrap(continuous(300) + 5, 20, engine="weights")
    assert "few_resamples" in got.flags
    assert got.p_value >= 2 / 21
    assert not got.significant


def test_coverage_of_the_exact_engine_is_near_nominal():
    misses = 0
    for seed in range(400):
        x = em_differences(300, seed, gain=0.06)
        got = bca_bootstrap(x)
        misses += not got.lower <= 0.0 <= got.upper
    assert misses <= 34  # 20 expected; P(more than 34 | 5 %) < 0.1 %


def test_importing_bem_stats_does_not_load_torch():
    code = "import sys, bem.stats; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


UNITS = [1e-300, 1e-9, 1e-3, 0.3, 7.0, 1e9, 1e140]
SHIFTS = [-1e3, 0.1, np.pi, 1e4]
SAMPLES = {
    "em": em_differences(120, 1),
    "em over seeds": em_differences(120, 2) / 3,
    "smooth": continuous(120),
    "few": continuous(12),
    "nearly all equal": np.append(np.zeros(90), continuous(12)),
}


def same_up_to(one, two, back, unit):
    """Two intervals agree once the second is put back: limits, se, p-values, engine, flags."""
    width = one.upper - one.lower
    assert (one.engine, one.flags, one.n) == (two.engine, two.flags, two.n)
    for key in ("lower", "upper", "observed"):
        assert back(getattr(two, key)) == pytest.approx(getattr(one, key), abs=1e-5 * width)
    assert two.se / unit == pytest.approx(one.se, rel=1e-6)
    assert two.p_value == pytest.approx(one.p_value, rel=1e-4, abs=1e-12)
    assert two.acceleration == pytest.approx(one.acceleration, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("engine", ["auto", "weights"])
@pytest.mark.parametrize("clustered", [False, True])
def test_another_unit_of_the_scores_is_another_unit_of_the_interval(sample, engine, clustered):
    x, margin = SAMPLES[sample], 0.011
    options = {"engine": engine, "clusters": np.arange(len(x)) // 2 if clustered else None}
    reference = bca_bootstrap(x, 2000, margin=margin, **options)
    for unit in UNITS:
        got = bca_bootstrap(x * unit, 2000, margin=margin * unit, **options)
        same_up_to(reference, got, lambda end, unit=unit: end / unit, unit)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("clustered", [False, True])
def test_scores_that_all_rise_by_the_same_move_the_interval_by_it(sample, clustered):
    x, clusters = SAMPLES[sample], np.arange(len(SAMPLES[sample])) // 2 if clustered else None
    reference = bca_bootstrap(x, 2000, margin=0.011, clusters=clusters)
    for shift in SHIFTS:
        got = bca_bootstrap(x + shift, 2000, margin=0.011 + shift, clusters=clusters)
        same_up_to(reference, got, lambda end, shift=shift: end - shift, 1.0)


def test_a_median_of_tiny_scores_has_an_interval_too():
    x, median = continuous(60), lambda s: np.median(s, axis=-1)
    one, two = (
        bca_bootstrap(x, 500, statistic=median),
        bca_bootstrap(x * 1e-300, 500, statistic=median),
    )
    assert [two.lower / 1e-300, two.upper / 1e-300] == pytest.approx([one.lower, one.upper])


@pytest.mark.parametrize("unit", [5e-324, 1e-310])
def test_subnormal_scores_give_finite_limits_inside_the_data(unit):
    x = np.rint(continuous(50) * 20) * unit
    got = bca_bootstrap(x)
    assert x.min() <= got.lower <= got.upper <= x.max()
    assert got.lower < got.upper


def test_scores_whose_squares_overflow_are_refused():
    with pytest.raises(
        DataError, match=r"paired_scores\[0\] is .*e\+299: beyond 1e\+150 .* larger unit"
    ):
        bca_bootstrap(continuous(50) * 1e300)


def test_masked_scores_are_refused_not_read():
    with pytest.raises(DataError, match="paired_scores has 1 masked entries"):
        bca_bootstrap(np.ma.masked_array([1.0, 2, 1, 2, -50], mask=[0, 0, 0, 0, 1]))
    unmasked = bca_bootstrap(np.ma.masked_array([1.0, 2, 1, 2], mask=False))
    assert unmasked == bca_bootstrap([1.0, 2, 1, 2])


@pytest.mark.parametrize(
    "kind", [np.int8, np.uint16, np.float16, np.float32, np.longdouble, object, bool]
)
def test_the_type_of_the_scores_does_not_matter(kind):
    x = np.random.default_rng(0).integers(0, 2, 60)
    assert bca_bootstrap(x.astype(kind)) == bca_bootstrap(x.astype(float))


def test_values_that_differ_by_rounding_alone_are_degenerate():
    x = np.full(50, 0.1)
    x[::2] = 0.1 + 2e-17 + 1e-16
    assert bca_bootstrap(x).degenerate
    assert bca_bootstrap(x, clusters=np.arange(50) // 3).degenerate
