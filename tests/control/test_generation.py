"""What `generate` says of its prompts holds for its own forward passes, on every kind of model."""

import pytest
import torch
import transformers
from transformers import LogitsProcessorList

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks import TOLERANCE
from bem.adapters.checks_models import VOCAB, tiny_model
from bem.errors import AttachError

SETTINGS = dict(
    max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None,
    return_dict_in_generate=True, output_logits=True, output_scores=True,
)  # fmt: skip
BERT = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, is_decoder=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def adapted(model, variant="v1"):
    return probe.perturbed(bem.attach(model, variant, rank=4, chunk_size=8)).model


def attached(variant="v1"):
    return adapted(tiny_model("llama"), variant)


def ids(tokens, rows=2):
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", ["pt1", "v1", "v2", "v4"])
def test_the_unguided_branch_of_guidance_is_a_sequence_of_its_own(variant):
    model, prompt = attached(variant), ids(21)
    mask = torch.ones_like(prompt)
    mask[1, :9] = 0
    extra = {"evidence": torch.full((2, 8), 0.7)} if variant == "v2" else {}
    out = model.generate(prompt, attention_mask=mask, guidance_scale=2.0, **SETTINGS, **extra)
    guided, with_prompt = torch.stack(out.scores, 1), torch.stack(out.logits, 1).log_softmax(-1)
    with torch.no_grad():  # it begins at the prompt's last token
        alone = model(input_ids=out.sequences[:, 20:-1], use_cache=False).logits.log_softmax(-1)
    assert (2 * with_prompt - alone - guided).abs().max() < TOLERANCE


def test_a_logits_processor_may_run_the_model_on_other_rows():
    model, prompt = attached(), ids(21)
    plain = model.generate(prompt, **SETTINGS).sequences
    alone = probe.forward(model, ids(30, 3), use_cache=False).logits

    def ask(sequences, scores):
        assert torch.equal(probe.forward(model, ids(30, 3)).logits, alone)
        return scores

    processors = LogitsProcessorList([ask])
    again = model.generate(prompt, logits_processor=processors, **SETTINGS).sequences
    assert torch.equal(again, plain)


def test_a_static_cache_of_layers_that_attend_and_keep_a_state_too():
    config = transformers.FalconH1Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
        mamba_n_groups=1, mamba_d_state=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = adapted(transformers.FalconH1ForCausalLM(config).eval())
    plain = model.generate(ids(13), **SETTINGS)
    static = model.generate(ids(13), cache_implementation="static", **SETTINGS)
    assert all(
        (a - b).abs().max() < TOLERANCE for a, b in zip(plain.logits, static.logits, strict=True)
    )


@pytest.mark.parametrize("variant", ["v1", "v4"])
def test_a_model_that_widens_the_mask_before_its_decoder(variant):
    torch.manual_seed(0)
    config = transformers.MegatronBertConfig(**BERT)
    model = adapted(transformers.MegatronBertForCausalLM(config).eval(), variant)
    prompt = ids(13)
    out = model.generate(prompt, **SETTINGS)
    turns = torch.zeros_like(out.sequences, dtype=torch.bool)
    turns[:, 12] = True
    whole = probe.forward(model, out.sequences, turn_starts=turns, use_cache=False).logits
    assert (torch.stack(out.logits, 1) - whole[:, 12:-1]).abs().max() < TOLERANCE
    mask = torch.ones_like(prompt)
    mask[0, -4:] = 0
    with torch.no_grad():
        by_name = model(input_ids=prompt, attention_mask=mask, use_cache=False).logits
        by_place = model.base_model.model(prompt, mask, use_cache=False).logits
    assert torch.equal(by_name, by_place)


def test_film_on_blocks_that_return_a_list():
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4)
    base = transformers.OpenAIGPTLMHeadModel(config).eval()
    before = probe.forward(base, ids(13)).logits
    assert (probe.forward(adapted(base, "v4"), ids(13)).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("form", [lambda t: t, torch.Tensor.tolist, torch.Tensor.numpy])
def test_turn_starts_may_be_lists_and_arrays(form):
    model, prompt = attached(), ids(21)
    turns = torch.zeros(2, 21, dtype=torch.bool)
    turns[:, 6] = True
    plain = probe.forward(model, prompt, turn_starts=turns, use_cache=False).logits
    assert torch.equal(
        probe.forward(model, prompt, turn_starts=form(turns), use_cache=False).logits, plain
    )
    answers = [model.generate(prompt, turn_starts=t, **SETTINGS) for t in (turns, form(turns))]
    assert torch.equal(answers[0].sequences, answers[1].sequences)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"turn_starts": [[0], [0, 1]]}, "turn_starts must be a tensor, one value per token"),
        ({"turn_starts": "x"}, "turn_starts must be a tensor"),
        ({"route": torch.zeros(2, 21)}, "route must hold whole numbers"),
        ({"route": torch.ones(2, 21, dtype=torch.long)}, "none are mounted here: see bem.mount"),
        ({"conditioning": [1]}, "conditioning must map names to features, found list"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(told, message):
    model, prompt = attached(), ids(21)
    for run in (
        model,
        model.base_model.model.model,
        lambda input_ids, **k: model.generate(input_ids, max_new_tokens=2, **k),
    ):
        with pytest.raises(AttachError, match=message):
            run(input_ids=prompt, **told)
