"""Models that an adapter cannot be exact on are refused when it is attached, with the reason."""

import pytest
import torch
import transformers
from transformers import CpmAntConfig, RecurrentGemmaConfig, RwkvConfig, XLMConfig, XLNetConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import bem
from bem.adapters.checks_models import tiny_model
from bem.adapters.unfit import UNCONTROLLED, UNFIT, refuse_uncontrolled, refuse_unfit
from bem.errors import AttachError

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
PAST = {
    "RecurrentGemmaForCausalLM": (
        RecurrentGemmaConfig(
            **SMALL, lru_width=32, intermediate_size=48, num_key_value_heads=1, head_dim=8
        ),
        "inside its layers",
    ),
    "RwkvForCausalLM": (
        RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=4, attention_hidden_size=32),
        "keeps its past in `state`",
    ),
    "XLMWithLMHeadModel": (
        XLMConfig(vocab_size=64, emb_dim=32, n_layers=4, n_heads=4, causal=True),
        "keeps its past in `cache`",
    ),
    "XLNetLMHeadModel": (
        XLNetConfig(vocab_size=64, d_model=32, n_layer=4, n_head=4, d_inner=48),
        "in `mems`",
    ),
}


@pytest.mark.parametrize("name", PAST)
def test_a_control_is_refused_where_it_cannot_travel_with_the_past(name):
    config, why = PAST[name]
    model = getattr(transformers, name)(config)
    with pytest.raises(AttachError, match=f"{name} .*{why}.*attach\\(model, 's0'\\)"):
        bem.attach(model, "v4", rank=2)
    assert not any(m._forward_hooks for m in model.modules()), "the refusal left something behind"
    assert bem.attach(model, "s0", rank=2).sizes(), "a static adapter needs no past"


def test_blocks_that_see_other_tokens_than_the_text_are_refused():
    sizes = dict(dim_head=8, dim_ff=48, prompt_length=4)
    model = transformers.CpmAntForCausalLM(CpmAntConfig(**SMALL, **sizes))
    for variant in ("s0", "v1"):
        with pytest.raises(
            AttachError, match=r"CpmAntForCausalLM puts .* prompt tokens of its own"
        ):
            bem.attach(model, variant, rank=2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
def test_a_past_in_a_cache_of_transformers_is_fine(architecture):
    model = tiny_model(architecture)
    refuse_unfit(model)
    refuse_uncontrolled(model)


def test_the_lists_name_model_types_of_transformers():
    assert {*UNFIT, *UNCONTROLLED} <= {
        *CONFIG_MAPPING,
        "musicgen_decoder",
        "musicgen_melody_decoder",
    }


def test_blocks_that_run_several_times_in_a_pass_are_refused_where_nothing_said_so_before():
    attached = bem.attach(tiny_model("llama"), "v1", rank=2)
    attached.base.model.layers.append(attached.base.model.layers[1])
    attached.base.model.config.num_hidden_layers = 5
    with pytest.raises(AttachError, match="block 1 runs several times"):
        attached.model(input_ids=torch.arange(3, 9)[None], use_cache=False)
