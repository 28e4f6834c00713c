import numpy as np
import pytest

from bem.config import GatesConfig
from bem.stats.costs import cost_checks
from bem.stats.measurement import RouterFacts
from tests.stats.arms import arm, pair

GATES = GatesConfig(n_bootstrap=1000)
BASE = arm("s0", np.zeros(30))


def check(name, gates=GATES, baseline=BASE, **changes):
    checks = cost_checks(baseline, arm("v1", np.zeros(30), **changes), gates)
    return next(c for c in checks if c.name == name)


@pytest.mark.parametrize(
    ("parameters", "passed"), [(100_000, True), (105_000, True), (105_001, False), (95_000, True)]
)
def test_the_budget_is_exact(parameters, passed):
    assert check("budget.parameters", adapter_parameters=parameters).passed is passed


def test_cheaper_passes_with_a_note_unless_forbidden():
    assert "cheaper" in check("budget.flops", adapter_flops_per_token=10).reason
    strict = GATES.model_copy(update={"allow_cheaper": False})
    assert check("budget.flops", strict, adapter_flops_per_token=10).passed is False


@pytest.mark.parametrize("bad", [None, np.nan])
def test_a_budget_that_is_unknown_is_open(bad):
    assert check("budget.parameters", adapter_parameters=bad).passed is None


def test_a_baseline_without_an_adapter_has_no_budget_to_match():
    free = arm("base", np.zeros(30), adapter_parameters=0)
    assert check("budget.parameters", baseline=free).passed is None


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (1.14, True), (1.3, False)])
def test_latency_is_judged_by_its_limits(factor, passed):
    slow = {phase: factor * np.asarray(t) for phase, t in BASE.latency_ms.items()}
    assert check("latency.decode", latency_ms=slow).passed is passed


def test_noisy_latency_near_the_limit_is_open():
    noise = np.exp(np.random.default_rng(0).normal(0, 0.2, 20))
    slow = {p: 1.12 * np.asarray(t) * noise for p, t in BASE.latency_ms.items()}
    assert check("latency.prefill", latency_ms=slow).passed is None


@pytest.mark.parametrize(
    "rounds",
    [[1.0] * 3, [1.0] * 19, [np.nan] * 20, [0.0] * 20],
    ids=["few", "unpaired", "nan", "zero"],
)
def test_latency_that_cannot_be_paired_is_open(rounds):
    few = arm("s0", np.zeros(30), latency_ms={"decode": [1.0] * 3}) if len(rounds) == 3 else BASE
    assert check("latency.decode", baseline=few, latency_ms={"decode": rounds}).passed is None


@pytest.mark.parametrize(("memory", "passed"), [(1.05e9, True), (1.06e9, False), (np.nan, None)])
def test_memory_is_exact(memory, passed):
    assert check("memory", memory_bytes=memory).passed is passed


def test_cache_hits_may_fall_by_the_margin_only():
    rng = np.random.default_rng(0)
    hits = np.full(50, 32)
    assert check("kv_hit", kv_hits=hits).passed is True
    assert check("kv_hit", kv_hits=hits - rng.integers(3, 6, 50)).passed is False
    assert check("kv_hit", kv_hits=hits - rng.integers(-2, 3, 50)).passed is None


@pytest.mark.parametrize("changes", [
    {"kv_hits": np.full(10, 1), "kv_needed": np.full(10, 2)},
    {"kv_hits": np.full(50, 99)},
    {"kv_hits": np.full(50, np.nan)},
    {"kv_needed": None},
], ids=["unpaired", "more hits than needed", "nan", "missing"])  # fmt: skip
def test_cache_hits_that_make_no_sense_are_open(changes):
    checks = cost_checks(BASE, arm("v1", np.zeros(30), **changes), GATES)
    assert next(c for c in checks if c.name == "kv_hit").passed is None


def test_a_router_plans_at_most_three_actions():
    assert check("router.plan", router=RouterFacts([1, 3])).passed is True
    assert check("router.plan", router=RouterFacts([1, 4])).passed is False


def test_worse_evidence_must_not_score_better():
    scores = np.random.default_rng(0).random(60)
    good = {"clean": scores + 0.2, "corrupt": scores + 0.1, "shuffled": scores}
    assert check("router.clean>=corrupt", router=RouterFacts(index_swap=good)).passed is True
    bad = {**good, "clean": scores - 0.2 * scores}
    assert check("router.clean>=corrupt", router=RouterFacts(index_swap=bad)).passed is False
    part = {"clean": scores}
    assert check("router.corrupt>=shuffled", router=RouterFacts(index_swap=part)).passed is None


def test_what_is_waived_is_not_checked():
    gates = GATES.model_copy(update={"waived": ("budget", "latency", "memory", "kv_hit", "router")})
    assert cost_checks(*pair(), gates) == []
