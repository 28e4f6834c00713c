"""Greedy answers are the most likely tokens, whatever the base's own settings are."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import bem
from bem.errors import MeasurementError
from bem.training.answers import ends_of, greedy_answers, greedy_generation
from bem.training.data import Example, encode
from tests.conftest import make_llama

NEW = 24


@pytest.fixture
def attached(tokenizer):
    model = make_llama()
    model.lm_head.weight.data *= 20  # logits far enough apart for one clear winner
    return bem.attach(model, "s0", rank=2)


@pytest.fixture
def prompts(tokenizer):
    rows = [Example("a", "return the value", ("x",)), Example("b", "name it", ("x",))]
    return [encode(row, tokenizer, 64, with_answer=False) for row in rows]


def by_hand(model, prompt, ends):
    """The most likely token, one by one, without `generate` and without a cache."""
    ids = list(prompt.input_ids)
    for _ in range(NEW):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt.input_ids) :]


SETTINGS = {
    "repetition_penalty": 10.0,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": list(range(5, 200)),
    "begin_suppress_tokens": list(range(5, 300)),
    "bad_words_ids": [[i] for i in range(5, 200)],
    "sequence_bias": [[[i], 50.0] for i in range(5, 10)],
    "min_length": 60,
    "min_new_tokens": 20,
    "max_length": 10,
    "max_time": 0.0,
    "stop_strings": ["e"],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": (1, 5.0),
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 3,
    "top_p": 0.5,
    "num_beams": 3,
    "num_return_sequences": 2,
    "length_penalty": -2.0,
    "early_stopping": True,
    "return_dict_in_generate": True,
    "output_scores": True,
    "use_cache": False,
    "cache_implementation": "static",
    "prefill_chunk_size": 3,
    "renormalize_logits": True,
    "guidance_scale": 3.0,
    "prompt_lookup_num_tokens": 3,
    "watermarking_config": {"greenlist_ratio": 0.2, "bias": 30.0},
    "token_healing": True,
    "pad_token_id": 9,
    "bos_token_id": 9,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_of_the_base_changes_a_greedy_answer(attached, tokenizer, prompts, name):
    ends = ends_of(attached.model, tokenizer)
    expected = [by_hand(attached.model, prompt, ends) for prompt in prompts]
    assert any(expected)
    for config in (attached.model.generation_config, attached.base.generation_config):
        setattr(config, name, SETTINGS[name])
    assert greedy_answers(attached.model, tokenizer, prompts, NEW) == expected


def test_the_settings_of_the_base_stay_as_they_were(attached, tokenizer, prompts):
    attached.base.generation_config.repetition_penalty = 1.5
    greedy_answers(attached.model, tokenizer, prompts, 2)
    assert attached.base.generation_config.repetition_penalty == 1.5


def test_an_answer_ends_where_the_chat_form_or_the_base_ends_it(attached, tokenizer, prompts):
    (first, _) = greedy_answers(attached.model, tokenizer, prompts, NEW)
    for config in (attached.model.generation_config, attached.base.generation_config):
        config.eos_token_id = [1, first[3]]
    assert (
        greedy_answers(attached.model, tokenizer, prompts, NEW)[0] == first[: first.index(first[3])]
    )
    settings = greedy_generation(attached.model, tokenizer, NEW)
    assert settings.eos_token_id == sorted({1, tokenizer.eos_token_id, first[3]})


def test_an_answer_beyond_the_models_positions_is_refused_with_the_numbers(tokenizer, prompts):
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    attached = bem.attach(GPT2LMHeadModel(config).eval(), "s0", rank=2)
    longest = max(map(len, prompts))
    with pytest.raises(
        MeasurementError, match=rf"{longest} tokens and 40 new ones, .* 32 positions"
    ):
        greedy_answers(attached.model, tokenizer, prompts, 40)
    assert len(greedy_answers(attached.model, tokenizer, prompts, 32 - longest)) == 2


def test_a_prompt_of_another_tokenizer_is_refused_with_both_sizes(tokenizer, prompts):
    attached = bem.attach(make_llama(vocab_size=50), "s0", rank=2)
    with pytest.raises(MeasurementError, match="the model has 50 entries, the tokenizer 3"):
        greedy_answers(attached.model, tokenizer, prompts, 4)
