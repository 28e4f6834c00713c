"""Which models run, and what is said of the others."""

import pytest
import torch
import transformers

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import ARCHITECTURES, tiny_model
from bem.engine.engine import Engine
from bem.errors import EngineError
from tests.engine.plain import plain, prompts

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_of_the_contract_runs(architecture, tokenizer):
    subject = probe.perturbed(bem.attach(tiny_model(architecture), "v1", rank=4, chunk_size=8))
    asked = prompts(4, 13, 7)
    engine = Engine(subject, tokenizer, slots=2, prefill_tokens=8)
    given = engine.generate(asked, max_new_tokens=10, ignore_eos=True)
    assert [list(r.token_ids) for r in given] == [plain(subject, ids, 10) for ids in asked]


def test_attention_that_is_computed_eagerly_gets_its_masks_as_numbers(tokenizer):
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    subject = probe.perturbed(bem.attach(model, "s0", rank=4))
    asked = prompts(4, 13)
    given = Engine(subject, tokenizer).generate(asked, max_new_tokens=8, ignore_eos=True)
    assert [list(r.token_ids) for r in given] == [plain(subject, ids, 8) for ids in asked]


def test_a_sequence_may_be_as_long_as_the_window_of_attention_and_no_longer(tokenizer):
    config = transformers.MistralConfig(**SMALL, sliding_window=24)
    subject = bem.attach(transformers.MistralForCausalLM(config).eval(), "s0", rank=4)
    engine = Engine(subject, tokenizer)
    assert engine.max_tokens == 24
    (ids,) = prompts(16)
    (result,) = engine.generate([ids], max_new_tokens=8, ignore_eos=True)
    assert list(result.token_ids) == plain(subject, ids, 8)
    with pytest.raises(
        EngineError, match="16 prompt tokens and max_new_tokens 9 are more than the 24"
    ):
        engine.generate([ids], max_new_tokens=9)
    with pytest.raises(EngineError, match="max_tokens must be in 2 to 24"):
        Engine(subject, tokenizer, max_tokens=25)


def test_a_bias_by_distance_from_a_mask_is_found_by_the_probe(tokenizer):
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4)
    subject = bem.attach(transformers.BloomForCausalLM(config).eval(), "s0", rank=4)
    with pytest.raises(EngineError, match="rows at different places"):
        Engine(subject, tokenizer)


def test_layers_that_keep_no_keys_are_refused_by_name(tokenizer):
    config = transformers.Qwen3NextConfig(
        **SMALL, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, num_experts=2
    )
    torch.manual_seed(0)
    subject = bem.attach(transformers.Qwen3NextForCausalLM(config).eval(), "s0", rank=4)
    with pytest.raises(EngineError, match="linear_attention layers"):
        Engine(subject, tokenizer)


def test_a_model_in_training_mode_is_refused_and_can_be_put_right(tokenizer):
    subject = bem.attach(tiny_model("llama"), "v1", rank=4)
    engine = Engine(subject, tokenizer)
    subject.model.train()
    with pytest.raises(EngineError, match=r"call model\.eval\(\)"):
        engine.generate([[3, 4]])
    subject.model.eval()
    assert engine.generate([[3, 4]], max_new_tokens=2)[0].prompt_tokens == 2


def test_weights_that_change_under_running_sequences_are_noticed_when_the_next_one_comes(tokenizer):
    subject = probe.perturbed(bem.attach(tiny_model("llama"), "v1", rank=4))
    engine = Engine(subject, tokenizer)
    engine.submit(bem.Request([3, 4], max_new_tokens=9, ignore_eos=True))
    engine.step()
    subject.load_state_dict({n: t + 1 for n, t in subject.state_dict().items()})
    engine.submit(bem.Request([3, 4], max_new_tokens=9, ignore_eos=True))
    with pytest.raises(EngineError, match="changed in place while 1 sequences run"):
        engine.step()


def test_a_base_with_nothing_on_it_runs_too_but_not_one_whose_adapter_was_left_out(tokenizer):
    model, asked = tiny_model("llama"), prompts(4, 13, 70)
    engine = Engine(model, tokenizer)
    given = engine.generate(asked, max_new_tokens=8, ignore_eos=True)
    again = engine.generate(asked, max_new_tokens=8, ignore_eos=True)
    assert [r.cached_tokens for r in again] == [3, 12, 69]  # the chunk before a prompt's last token
    attached = bem.attach(model, "s0", rank=4)  # as it is born: it changes nothing
    expected = [plain(attached, ids, 8) for ids in asked]
    assert [list(r.token_ids) for r in given] == [list(r.token_ids) for r in again] == expected
    with pytest.raises(EngineError, match="carries an adapter"):
        Engine(model, tokenizer)


def test_half_precision_runs_and_begins_as_generate_does(tokenizer):
    model = tiny_model("llama").to(torch.bfloat16)
    subject = probe.perturbed(bem.attach(model, "v1", rank=4, chunk_size=8))
    asked = prompts(4, 13, 30)
    engine = Engine(subject, tokenizer, slots=2)
    cold, warm = (engine.generate(asked, max_new_tokens=6, ignore_eos=True) for _ in range(2))
    assert [r.token_ids[0] for r in cold] == [plain(subject, ids, 1)[0] for ids in asked]
    assert all(len(r.token_ids) == 6 for r in [*cold, *warm])
    assert [r.cached_tokens for r in warm] == [3, 12, 29]
