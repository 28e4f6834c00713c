"""What is not adapted is said: when attaching, in the handle, beside the price."""

import logging

import pytest
from transformers import MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

import bem
from bem.adapters.budget import price
from bem.adapters.checks_models import tiny_model
from bem.config import AdapterConfig
from tests.conftest import make_llama


def mixtral():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


def test_layers_below_the_router_layer_are_said(caplog):
    with caplog.at_level(logging.INFO, "bem"):
        attached = bem.attach(make_llama(num_hidden_layers=30), "s0", rank=2)
    said = "layers 0 to 6 of 30"
    assert f"not adapted: {said} (below router_layer 7)" in caplog.text
    assert "60 sites" not in repr(attached) and "46 sites in layers 7 to 29 of 30" in repr(attached)
    assert said in repr(attached) and said in attached.sites_report()
    assert (said, "not adapted: below router_layer 7", 0, 0.0) in attached.price().rows


def test_fused_experts_are_a_warning(caplog):
    attached = bem.attach(mixtral(), "v1", rank=2, router_layer=0)
    why = "its MLP ends in no linear layer: experts are fused into one tensor, MixtralExperts."
    assert [r.levelname for r in caplog.records] == ["WARNING"] and why in caplog.text
    assert why in repr(attached) and why in attached.sites_report()
    assert any(why in kind for _, kind, _, _ in attached.price().rows)


def test_a_variant_that_does_not_touch_mlps_does_not_miss_them(caplog):
    attached = bem.attach(mixtral(), "pt1", rank=2, router_layer=0)
    assert not caplog.records and attached.plan.left_alone == ()


@pytest.mark.parametrize("variant", ["s0", "v1", "v4"])
def test_the_price_of_a_config_says_what_the_attached_one_says(variant):
    model, config = mixtral(), AdapterConfig(variant=variant, rank=2)
    stated = price(model, config)
    assert bem.attach(model, config).price() == stated
    assert any(kind.startswith("not adapted") for _, kind, _, _ in stated.rows)


def test_where_everything_is_adapted_nothing_is_said(caplog):
    attached = bem.attach(tiny_model("llama"), "s0", rank=2, router_layer=0)
    assert not caplog.records and "not adapted" not in repr(attached)


def test_a_convolution_is_not_taken_for_experts():
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=4, state_size=8)
    attached = bem.attach(MambaForCausalLM(config), "s0", rank=2, router_layer=0)
    assert [e.why for e in attached.plan.left_alone] == ["its attention ends in no linear layer"]


def test_layers_that_only_read_another_sequence_are_said():
    model = make_llama(num_hidden_layers=4)
    block = model.model.layers[2]
    block.cross_attn = block.self_attn
    del block.self_attn
    alone = bem.attach(model, "s0", rank=2, router_layer=0).plan.left_alone
    why = "it attends to another sequence alone, and is not run without one"
    assert [(e.where, e.why, e.by_choice) for e in alone] == [("layer 2 of 4", why, False)]
