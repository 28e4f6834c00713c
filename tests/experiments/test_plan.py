"""Every arm is planned at the baseline's price, and says where it will act."""

import pytest

from bem.experiments.plan import plan_arms, primary_metrics
from bem.tasks.load import Task
from tests.conftest import make_llama
from tests.experiments.test_run import make_config


@pytest.fixture
def home(tmp_path):
    return tmp_path


def test_arms_are_matched_to_the_price_of_the_baseline(home, micro_base):
    arms = [
        {"name": "s0", "role": "baseline", "adapters": {"rank": 16}},
        {"name": "v3", "adapters": {"variant": "v3"}},
        {"name": "v4", "adapters": {"variant": "v4", "rank": 3}, "match": "none"},
    ]
    plans = plan_arms(make_llama(), make_config(home, micro_base, arms=arms))
    assert [plan.adapter.rank for plan in plans][::2] == [16, 3]
    assert plans[1].adapter.rank > 2


def test_the_family_is_quality_and_what_the_tasks_are_about():
    def task(name: str, primary: str) -> Task:
        return Task(name, [], [], (primary,), primary, 8)

    assert primary_metrics([task("a", "em"), task("b", "em")]) == ["em"]
    assert primary_metrics([task("a", "em"), task("b", "chrf")]) == ["quality", "em", "chrf"]
    assert primary_metrics([task("a", "em"), task("b", "loss")]) == ["quality", "em"]
    assert primary_metrics([task("a", "loss")]) == ["quality"]
