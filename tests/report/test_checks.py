"""A check says what it is about, dots in the names of slices included."""

import pytest

from bem.report.checks import Subject, effect_of, subject_of
from bem.stats.verdict import Check
from tests.report.test_words import effect, verdict


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("regression.f1", Subject("regression", metric="f1")),
        ("slice.qa/1.5.em", Subject("slice", metric="em", slice="qa/1.5")),
        ("latency.decode", Subject("latency", phase="decode")),
        ("latency", Subject("latency")),
        ("budget.flops", Subject("budget", metric="flops")),
        ("kv_hit", Subject("kv_hit")),
    ],
)
def test_a_check_is_about_a_metric_a_slice_or_a_phase(name, subject):
    check = Check(name, True, "")
    assert subject_of(check, verdict(check)) == subject


def test_a_check_of_quality_is_about_the_primary_metric_that_it_states():
    effects = (effect(metric="em", gain=0.1), effect(metric="f1", gain=0.2))
    check = Check("quality", True, "", value=0.2)
    assert subject_of(check, verdict(check, effects=effects)).metric == "f1"
    assert effect_of(check, verdict(check, effects=effects)) is effects[1]


def test_costs_are_about_no_effect():
    check = Check("memory", True, "", value=1.0)
    assert effect_of(check, verdict(check)) is None
