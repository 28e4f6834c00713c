import json

import numpy as np
import pytest

from bem.config import GatesConfig
from bem.errors import DataError
from bem.stats import Verdict, judge
from bem.stats.measurement import RouterFacts
from bem.stats.verdict import Check
from tests.stats.arms import arm, pair, scores

FAST = GatesConfig(n_bootstrap=1000, reported_slices=("easy",))


def full_verdict():
    """Every kind of check, a latency of too few rounds, flags, waivers and unjudged slices."""
    baseline, candidate = scores(400, 60, 10)
    swap = np.random.default_rng(0).random(400)
    facts = RouterFacts([2, 4], {"clean": swap + 0.2, "corrupt": swap + 0.1, "shuffled": swap})
    slices = {"hard": np.arange(400) % 2 == 0, "easy": np.arange(400) % 2 == 1}
    old = arm("s0", baseline, slices=slices, latency_ms={"decode": [1.0] * 3})
    new = arm("v1", candidate, router=facts, latency_ms={"decode": [1.0] * 3})
    return judge(old, {"v1": new}, FAST.model_copy(update={"waived": ("memory",)}))["v1"]


@pytest.mark.parametrize("make", [full_verdict, lambda: judge(None, {"v1": pair()[1]})["v1"]])
def test_a_verdict_read_back_from_json_is_the_same(make):
    verdict = make()
    assert Verdict.from_json(verdict.to_json()) == verdict
    assert Verdict.from_dict(verdict.to_dict()) == verdict


def test_its_json_is_plain_and_holds_names_and_reasons_for_other_readers():
    plain = json.loads(full_verdict().to_json())
    assert {"quality", "slice.hard.em", "latency.decode", "router.plan", "index_swap.trend"} <= {
        c["name"] for c in plain["checks"]
    }
    assert any(r.startswith("not judged slice easy") for r in plain["reasons"])
    assert plain["mde"]["em"] > 0


def test_a_check_says_typed_what_it_is_about():
    checks = full_verdict().checks
    said = {(c.kind, c.metric, c.slice, c.phase) for c in checks}
    assert ("slice", "em", "hard", None) in said
    assert ("latency", None, None, "decode") in said
    assert ("budget", "parameters", None, None) in said
    assert ("index_swap", None, None, "clean>=corrupt") in said
    assert ("quality", "em", None, None) in said


def test_a_limit_that_does_not_exist_is_none():
    check = Check("latency", None, "3 rounds", ci_low=0.0, ci_high=float("inf"), value=float("nan"))
    assert (check.ci_low, check.ci_high, check.value) == (0.0, None, None)
    latency = full_verdict().check("latency.decode")
    assert latency.passed is None and latency.ci_high is None


@pytest.mark.parametrize("text", ["[]", "{", '{"checks": []}', '{"checks": [{}], "effects": []}'])
def test_what_is_no_verdict_is_refused(text):
    with pytest.raises(DataError, match="no verdict"):
        Verdict.from_json(text)


def test_a_name_that_does_not_exist_is_answered_with_those_that_do():
    verdict = judge(*(lambda a, b: (a, {"v1": b}))(*pair()), FAST)["v1"]
    with pytest.raises(KeyError, match=r"quality, regression\.em"):
        verdict.check("slice.hard.em")
    with pytest.raises(KeyError, match="no effect on f1"):
        verdict.effect("f1")
