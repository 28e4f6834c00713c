import numpy as np
import pytest

from bem.config import GatesConfig
from bem.stats.costs import cost_checks, costs_not_measured
from bem.stats.measurement import RouterFacts
from bem.stats.monotone import index_swap
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


@pytest.mark.parametrize(("memory", "passed"), [(1.05e6, True), (1.06e6, False), (np.nan, None)])
def test_memory_is_exact(memory, passed):
    assert check("memory", adapter_memory_bytes=memory).passed is passed


def test_memory_is_what_the_adapter_adds():
    # the base's own weights, the same on both sides, would hide any difference
    whole = check("memory", adapter_memory_bytes=None)
    assert whole.passed is None and "adapters add None" in whole.reason
    assert check("memory", adapter_memory_bytes=3e6).value == pytest.approx(3.0)


def test_cache_hits_may_fall_by_the_margin_only():
    rng = np.random.default_rng(0)
    hits = np.full(50, 32)
    assert check("kv_hit", kv_hits=hits).passed is True
    assert check("kv_hit", kv_hits=hits - rng.integers(3, 6, 50)).passed is False
    assert check("kv_hit", kv_hits=hits - rng.integers(-2, 3, 50)).passed is None


@pytest.mark.parametrize(("changes", "reason"), [
    ({"kv_hits": np.full(10, 1), "kv_held": np.full(10, 2), "kv_needed": np.full(10, 2)}, "paired"),
    ({"kv_hits": np.full(50, 41)}, "what the cache held"),
    ({"kv_held": np.zeros(50)}, "what the cache held"),
    ({"kv_hits": np.full(50, 65), "kv_held": np.full(50, 99)}, "needed"),
    ({"kv_hits": np.full(50, np.nan)}, "finite"),
    ({"kv_needed": None}, "no kv_needed"),
    ({"kv_held": None}, "no kv_held"),
], ids=["unpaired", "more than held", "an empty cache", "more than needed", "nan", "no need",
        "no cache length"])  # fmt: skip
def test_cache_hits_that_make_no_sense_are_open(changes, reason):
    kv_hit = check("kv_hit", **changes)
    assert kv_hit.passed is None and reason in kv_hit.reason


def seeds_of(rows, noise=0.0):
    """Cache use of 40 requests, measured with `rows` seeds that hit alike."""
    rng = np.random.default_rng(0)
    hits = np.tile(rng.integers(20, 40, 40), (rows, 1))
    return {
        "kv_hits": hits,
        "kv_held": np.full((rows, 40), 64),
        "kv_needed": np.full((rows, 40), 64),
    }


def kv(new, old):
    sides = []
    for name, values in (("s0", old), ("v1", new)):
        side = arm(name, np.zeros(40))
        for key, value in values.items():
            object.__setattr__(side, key, value)
        sides.append(side)
    return next(c for c in cost_checks(*sides, GATES) if c.kind == "kv_hit")


def test_seeds_of_a_request_are_no_further_requests():
    one, five = (
        kv({**seeds_of(rows), "kv_hits": seeds_of(rows)["kv_hits"] - 1}, seeds_of(rows))
        for rows in (1, 5)
    )
    assert (one.ci_low, one.ci_high) == pytest.approx((five.ci_low, five.ci_high))
    assert "over 40 independent requests" in five.reason


def test_requests_and_seeds_in_one_row_are_refused():
    flat = {key: values.ravel() for key, values in seeds_of(3).items()}
    assert "as [seeds, requests]" in kv(flat, flat).reason


def test_requests_on_one_document_are_one():
    labels = [f"d{i // 4}" for i in range(40)]
    side = arm("s0", np.zeros(40), clusters=labels, **{k: v[0] for k, v in seeds_of(1).items()})
    kv_hit = next(c for c in cost_checks(side, side, GATES, labels) if c.kind == "kv_hit")
    assert kv_hit.passed is None and "only 10.0 independent requests" in kv_hit.reason


def test_requests_that_are_examples_are_paired_by_their_ids():
    use = {key: values[0] for key, values in seeds_of(1).items()}
    old = arm("s0", np.zeros(40), **use)
    order = np.random.default_rng(1).permutation(40)
    new = arm("v1", np.zeros(40), example_ids=[old.example_ids[i] for i in order],
              **{key: values[order] for key, values in use.items()})  # fmt: skip
    kv_hit = next(c for c in cost_checks(old, new, GATES) if c.kind == "kv_hit")
    assert (kv_hit.ci_low, kv_hit.ci_high, kv_hit.passed) == (0.0, 0.0, True)


def test_a_router_plans_at_most_three_actions():
    assert check("router.plan", router=RouterFacts([1, 3])).passed is True
    assert check("router.plan", router=RouterFacts([1, 4])).passed is False


def swap(**scores):
    return {"router": RouterFacts(index_swap=scores)}


def test_worse_evidence_must_not_score_better():
    scores = np.random.default_rng(0).random(60)
    good = {"clean": scores + 0.2, "corrupt": scores + 0.1, "shuffled": scores}
    for phase in ("clean>=corrupt", "corrupt>=shuffled", "trend"):
        assert check(f"index_swap.{phase}", **swap(**good)).passed is True
    bad = {**good, "clean": scores - 0.2 * scores}
    assert check("index_swap.clean>=corrupt", **swap(**bad)).passed is False
    assert check("index_swap.corrupt>=shuffled", **swap(clean=scores)).passed is None


def test_scores_that_ignore_the_evidence_pass_no_trend():
    scores = np.random.default_rng(0).random(60)
    same = swap(clean=scores, corrupt=scores, shuffled=scores)
    assert check("index_swap.trend", **same).passed is None


def test_a_trend_without_all_conditions_is_open():
    scores = np.random.default_rng(0).random(60)
    assert check("index_swap.trend", **swap(clean=scores, shuffled=scores - 0.1)).passed is None


def test_the_index_swap_knows_the_clusters_of_the_examples():
    scores = np.random.default_rng(0).random(30).repeat(2)
    fall = {"clean": scores + 0.2, "corrupt": scores + 0.1, "shuffled": scores}
    labels = [f"d{i // 2}" for i in range(60)]
    base = arm("s0", np.zeros(60))
    checks = cost_checks(base, arm("v2", np.zeros(60), **swap(**fall)), GATES, labels)
    step = index_swap(fall, labels, GATES).steps[0]
    first = next(c for c in checks if c.phase == "clean>=corrupt")
    assert (first.value, first.ci_low, first.ci_high) == (
        step.difference, step.ci_low, step.ci_high,
    )  # fmt: skip


@pytest.mark.parametrize("facts", [None, RouterFacts()])
def test_a_router_without_facts_is_open_and_other_arms_have_no_such_gate(facts):
    side = arm("v1", np.zeros(30), router=facts)
    named = {c.name: c.passed for c in cost_checks(BASE, side, GATES, routed=True)}
    assert (named["router.plan"], named["index_swap"]) == (None, None)
    plain = {c.kind for c in cost_checks(BASE, side, GATES)}
    assert not plain & {"router", "index_swap"}


def test_what_is_waived_is_not_checked():
    waived = ("budget", "latency", "memory", "kv_hit", "router", "index_swap")
    gates = GATES.model_copy(update={"waived": waived})
    assert cost_checks(*pair(), gates, routed=True) == []


def test_costs_that_no_side_measured_are_named_and_those_of_one_side_are_not():
    free = {"latency_ms": {}, "adapter_memory_bytes": None, "kv_hits": None, "kv_held": None,
            "kv_needed": None, "adapter_parameters": None, "adapter_flops_per_token": None}  # fmt: skip
    bare = arm("s0", np.zeros(30), **free)
    assert costs_not_measured([bare, bare]) == ("budget", "latency", "memory", "kv_hit")
    half = arm("v1", np.zeros(30), **{**free, "latency_ms": {"decode": [1.0] * 9}})
    assert costs_not_measured([bare, half]) == ("budget", "memory", "kv_hit")
