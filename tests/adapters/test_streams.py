"""Hidden states in several streams: read as their mean, changed alike, adapted exactly."""

import pytest
import torch
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Qwen4ExpForCausalLM,
    Qwen4ExpTextConfig,
)

import bem
from bem.adapters.checks import ARCHITECTURES, check_adapter
from bem.adapters.checks_models import tiny_model
from bem.adapters.streams import Streams, streams_of

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS = dict(moe_intermediate_size=24, num_experts_per_tok=2)
CHECKS = ["identity_at_birth", "disable_restores", "blind_to_the_future", "price_is_true"]
CACHED = ["padding_is_invisible", "generation_is_exact"]


def altup():
    per_layer = dict(vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=8)
    shared = dict(layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2)
    config = Gemma3nTextConfig(
        **SIZES, **per_layer, **shared, activation_sparsity_pattern=[0.0] * 4
    )
    return Gemma3nForCausalLM(config)


def hyper_connections_in_a_dimension():
    parts = dict(q_lora_rank=16, o_lora_rank=16, qk_rope_head_dim=4, index_head_dim=8)
    kinds = ["sliding_attention", "compressed_sparse_attention"] * 2
    config = DeepseekV4Config(
        **{**SIZES, "num_key_value_heads": 1},
        **EXPERTS,
        **parts,
        n_routed_experts=4,
        index_n_heads=2,
        o_groups=2,
        layer_types=kinds,
        mlp_layer_types=["moe"] * 4,
    )
    return DeepseekV4ForCausalLM(config)


def hyper_connections_side_by_side():
    linear = dict(linear_key_head_dim=8, linear_value_head_dim=8)
    linear |= dict(linear_num_key_heads=2, linear_num_value_heads=4)
    indexer = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=128)
    indexer |= dict(indexer_compress_ratio=4, hc_lowrank=8)
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    config = Qwen4ExpTextConfig(
        **sizes,
        **EXPERTS,
        **linear,
        **indexer,
        num_experts=4,
        shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "indexed_attention"] * 2,
    )
    return Qwen4ExpForCausalLM(config)


MAKERS = [altup, hyper_connections_in_a_dimension, hyper_connections_side_by_side]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("variant", ["v1", "v4"])
def test_an_adapter_keeps_its_contract_on_several_streams(maker, variant, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "streams", maker)
    cached = CACHED if maker is not hyper_connections_in_a_dimension else CACHED[1:]  # pads itself
    checks = [*CHECKS, *cached]
    make = lambda model: bem.attach(model, variant, rank=4, chunk_size=8)  # noqa: E731
    check_adapter(make, ["streams"], checks).raise_if_failed()


def test_one_stream_is_handed_on_as_it_is():
    hidden, one = torch.randn(2, 3, 4), streams_of(tiny_model("llama"))
    assert one.one(hidden) is hidden
    assert torch.equal(one.each(hidden, lambda h: h + 1), hidden + 1)


@pytest.mark.parametrize(
    ("streams", "shape"),
    [
        (Streams(dim=0), (5, 2, 3, 4)),
        (Streams(), (2, 3, 5, 4)),
        (Streams(side_by_side=5), (2, 3, 20)),
    ],
)
def test_streams_are_read_as_their_mean_and_changed_alike(streams, shape):
    hidden = torch.randn(shape)
    apart = hidden.view(2, 3, 5, 4) if len(shape) == 3 else hidden
    assert torch.equal(streams.one(hidden), apart.mean(streams.dim))
    by_token = torch.arange(6.0).view(2, 3, 1)
    changed = streams.each(hidden, lambda h: h + by_token)
    expected = apart + by_token.unsqueeze(streams.dim)
    assert torch.equal(changed, expected.view(shape))
