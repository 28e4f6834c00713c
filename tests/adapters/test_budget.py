import pytest

import bem
from bem.adapters.budget import match_rank, price
from bem.adapters.checks_models import tiny_model
from bem.config import AdapterConfig
from bem.errors import AttachError
from tests.conftest import make_llama


def test_the_price_of_static_lora_by_hand():
    found = price(tiny_model("llama"), AdapterConfig(variant="s0", rank=4))  # layers 1..3 of 4
    per_layer = 4 * (32 + 32) + 4 * (48 + 32)
    assert found.parameters == 3 * per_layer
    assert found.flops_per_token == 2 * 3 * per_layer


def test_the_controller_is_always_counted():
    found = price(tiny_model("llama"), AdapterConfig(variant="pt1", rank=4, d_control=8))
    rows = {kind: parameters for _, kind, parameters, _ in found.rows}
    assert rows["Controller"] == 64 * 8 + 8 + 8 * 8 + 8 + 8  # read, write, prior
    assert found.parameters == sum(r[2] for r in found.rows)


@pytest.mark.parametrize("variant", ["s0", "pt1", "v1", "v3", "v4"])
def test_a_rank_within_five_percent_is_found(variant):
    model = make_llama(hidden_size=96, intermediate_size=256, num_hidden_layers=6)
    target = price(model, AdapterConfig(variant="s0", rank=16))
    width = {"d_control": 16} if variant in ("pt1", "v1") else {}
    matched = match_rank(model, AdapterConfig(variant=variant, **width), target)
    assert abs(price(model, matched).parameters / target.parameters - 1) <= 0.05


def test_explicit_ranks_keep_their_proportion():
    model = make_llama(hidden_size=96, intermediate_size=256)
    config = AdapterConfig(variant="s0", rank=8, rank_attn=2, rank_mlp=14)
    target = price(model, AdapterConfig(variant="s0", rank_attn=4, rank_mlp=28))
    matched = match_rank(model, config, target)
    assert (matched.rank_attn, matched.rank_mlp) == (4, 28)


@pytest.mark.parametrize("variant", ["s0", "v1"])
def test_a_site_that_was_left_out_stays_out(variant):
    model = make_llama(hidden_size=96, intermediate_size=256)
    target = price(model, AdapterConfig(variant="s0", rank=20))
    matched = match_rank(model, AdapterConfig(variant=variant, rank_attn=0), target, tolerance=0.1)
    assert matched.rank_attn == 0 and matched.rank_mlp != 0
    assert not any("o_proj" in site for site, *_ in price(model, matched).rows)
    assert abs(price(model, matched).parameters / target.parameters - 1) <= 0.1


def test_active_ranks_keep_their_proportion():
    model = make_llama(hidden_size=96, intermediate_size=256)
    target = price(model, AdapterConfig(variant="v1", rank=32, d_control=16))
    matched = match_rank(model, AdapterConfig(variant="v1", d_control=16, k_active=2), target)
    assert matched.k_active == round(2 * matched.rank / 8)


def test_flops_can_be_matched_instead():
    model = make_llama(hidden_size=96, intermediate_size=256, num_hidden_layers=6)
    target = price(model, AdapterConfig(variant="v1", rank=16))
    matched = match_rank(model, AdapterConfig(variant="s0"), target, on="flops")
    assert abs(price(model, matched).flops_per_token / target.flops_per_token - 1) <= 0.05


def test_a_budget_that_no_rank_meets_is_an_error_with_both_neighbours():
    target = price(tiny_model("llama"), AdapterConfig(variant="s0", rank=1))
    with pytest.raises(AttachError, match=r"no rank of v4 meets .* rank 1 costs"):
        match_rank(tiny_model("llama"), AdapterConfig(variant="v4"), target, tolerance=0.001)


def test_the_stated_price_is_the_attached_one():
    model, config = tiny_model("llama"), AdapterConfig(variant="v1", rank=4)
    stated = price(model, config)
    assert bem.attach(model, config).price() == stated
