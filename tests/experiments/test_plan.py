"""Every arm is planned at the baseline's price, and says where it will act."""

import pytest

from bem.config import AdapterConfig
from bem.experiments.plan import adapted_layers, plan_arms, primary_metrics
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


@pytest.mark.parametrize("variant", ["s0", "pt1", "v1", "v2", "v3", "v4"])
def test_an_adapter_says_which_layers_of_how_many_it_acts_on(variant):
    model = make_llama(num_hidden_layers=30)
    adapter = AdapterConfig(variant=variant)
    assert str(adapted_layers(model, adapter)) == "layers 7 to 29 of 30, counted from 0"
    whole = adapter.model_copy(update={"router_layer": 0})
    assert str(adapted_layers(model, whole)) == "all 30 layers"
    last = adapter.model_copy(update={"router_layer": 29})
    assert str(adapted_layers(model, last)) == "layer 29 of 30, counted from 0"


def test_layers_without_a_site_are_not_counted_as_adapted():
    sites = {"attn_out": [f"model.layers.{i}.self_attn.o_proj" for i in (1, 3)], "mlp_down": "-"}
    layers = adapted_layers(make_llama(), AdapterConfig(sites=sites, router_layer=0))
    assert layers.adapted == (1, 3)
    assert str(layers) == "layers 1 to 3 (2 of them) of 4, counted from 0"


def test_every_plan_is_told_with_its_rank_and_layers(home, micro_base):
    arms = [
        {"name": "s0", "role": "baseline", "adapters": {"rank_attn": 2, "rank_mlp": 4}},
        {"name": "ar1", "route": "ar1", "role": "control"},
    ]
    config = make_config(home, micro_base, arms=arms, routing={})
    assert [plan.summary() for plan in plan_arms(make_llama(), config)] == [
        "s0, rank 2 / 4, layers 1 to 3 of 4, counted from 0",
        "experts, route ar1, layers 1 to 3 of 4, counted from 0",
    ]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (
            {"name": "v1", "adapters": {"variant": "v1", "rank": 9}},
            r"arms\.v1: rank 9 has no effect under `match: parameters`.*set `match: none`",
        ),
        (
            {"name": "v1", "adapters": {"rank": 9}, "match": "flops"},
            r"rank 9 has no effect under `match: flops`",
        ),
        (
            {"name": "ar1", "route": "ar1", "adapters": {"rank": 9, "alpha": 4}},
            r"arms\.ar1: rank, alpha has no effect with a route",
        ),
    ],
)
def test_a_setting_of_an_arm_that_something_else_decides_is_refused(home, micro_base, arm, message):
    arms = [{"name": "s0", "role": "baseline"}, arm]
    with pytest.raises(ValueError, match=message):
        make_config(home, micro_base, arms=arms, routing={})


def test_a_baseline_and_an_arm_with_match_none_have_the_rank_that_they_ask_for(home, micro_base):
    arms = [
        {"name": "s0", "role": "baseline", "adapters": {"rank": 3}},
        {"name": "v1", "adapters": {"variant": "v1", "rank": 5}, "match": "none"},
    ]
    plans = plan_arms(make_llama(), make_config(home, micro_base, arms=arms))
    assert [plan.adapter.rank for plan in plans] == [3, 5]


def test_timing_may_go_on_for_six_times_the_rounds_unless_the_config_says_otherwise(
    home, micro_base
):
    assert make_config(home, micro_base, latency_rounds=4).most_latency_rounds == 24
    few = make_config(home, micro_base, latency_rounds=4, latency_rounds_max=4)
    assert few.most_latency_rounds == 4
    with pytest.raises(ValueError, match="latency_rounds_max 3 is below latency_rounds 4"):
        make_config(home, micro_base, latency_rounds=4, latency_rounds_max=3)
