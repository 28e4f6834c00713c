"""Models that a controller cannot follow are refused when it is attached; a static update is not."""

import pytest
import torch
import transformers

import bem
from bem.errors import AttachError

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GEMMA3N = dict(
    head_dim=8, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, num_kv_shared_layers=1,
    laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=None, sliding_window=8,
    layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip
MINIMAX = dict(
    num_local_experts=2, block_size=8, layer_types=["linear_attention", "full_attention"] * 2
)
UNROUTABLE = {
    "Gemma3n": ("Gemma3nTextConfig", "Gemma3nForCausalLM", SIZES | GEMMA3N, "residual streams"),
    "MiniMax": ("MiniMaxConfig", "MiniMaxForCausalLM", SIZES | MINIMAX, "beside the layers"),
    "Rwkv": (
        "RwkvConfig",
        "RwkvForCausalLM",
        dict(vocab_size=64, hidden_size=32, num_hidden_layers=4, attention_hidden_size=32),
        "hands its state on as 'state'",
    ),
}


def model(name):
    config, kind, sizes, _ = UNROUTABLE[name]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()


@pytest.mark.parametrize("variant", ["pt1", "v1", "v4"])
@pytest.mark.parametrize("name", UNROUTABLE)
def test_control_is_refused_with_the_reason_and_a_way_out(name, variant):
    with pytest.raises(AttachError, match=rf"{UNROUTABLE[name][3]}.*s0 or v3"):
        bem.attach(model(name), variant, rank=2)


@pytest.mark.parametrize("name", UNROUTABLE)
def test_a_static_update_is_not_refused(name):
    attached = bem.attach(model(name), "s0", rank=2)
    x = torch.arange(3, 15)[None]
    out = attached.model.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 15)


def test_blocks_that_run_several_times_in_a_pass_are_refused_where_nothing_said_so_before():
    attached = bem.attach(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval(), "v1", rank=2
    )
    attached.base.model.layers.append(attached.base.model.layers[1])
    attached.base.model.config.num_hidden_layers = 5
    with pytest.raises(AttachError, match="block 1 runs several times"):
        attached.model(input_ids=torch.arange(3, 9)[None], use_cache=False)
