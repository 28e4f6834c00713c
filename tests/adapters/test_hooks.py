"""One forward pass: what reaches the sites, in which order, and what two passes never share."""

import threading
import weakref

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks import TOLERANCE
from bem.adapters.checks_models import VOCAB, tiny_model
from bem.adapters.hooks import add_last_stage
from bem.adapters.peft_method import rewire
from bem.errors import AttachError, CacheError

VARIANTS = ["pt1", "v1", "v2", "v4"]


def attached(variant="v1", arch="llama", **settings):
    return probe.perturbed(bem.attach(tiny_model(arch), variant, rank=4, chunk_size=8, **settings))


def ids(tokens, rows=2, seed=3):
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model, prompt, **extra):
    given = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    given |= dict(output_logits=True, return_dict_in_generate=True)
    out = model.generate(input_ids=prompt, **given, **extra)
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_threads_that_generate_at_once_get_what_each_gets_alone(variant):
    model = attached(variant).model
    prompts = [ids(n, 1, seed=n) for n in (5, 9, 14, 23)]
    alone = [generate(model, p) for p in prompts]
    together = [None] * len(prompts)

    def work(k):
        together[k] = generate(model, prompts[k])

    for _ in range(2):
        threads = [threading.Thread(target=work, args=(k,)) for k in range(len(prompts))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_static_cache_gives_what_a_dynamic_one_gives(variant, rows):
    model, prompt = attached(variant).model, ids(13, rows)
    mask = torch.ones_like(prompt)
    mask[rows - 1, :4] = 0
    plain = generate(model, prompt, attention_mask=mask)
    static = generate(model, prompt, attention_mask=mask, cache_implementation="static")
    assert (plain - static).abs().max() < TOLERANCE


def test_the_decoder_called_by_itself_is_the_decoder_of_the_whole_model():
    attached_ = attached()
    batch, mask = ids(20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    with torch.no_grad():
        whole = attached_.model(input_ids=batch, attention_mask=mask, output_hidden_states=True)
        attached_.model(input_ids=batch)  # another call between the two
        inner = attached_.base.model(input_ids=batch, attention_mask=mask).last_hidden_state
    difference = (whole.hidden_states[-1] - inner).abs().amax(-1) * mask
    assert difference.max() == 0


def test_a_forward_that_goes_past_the_hooks_is_an_error():
    base = attached().base
    with torch.no_grad(), pytest.raises(AttachError, match="without its decoder"):
        base.model.forward(input_ids=ids(5))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_documents_get_what_each_gets_alone(variant, use_cache):
    """The base isolates them without a cache; control does so always."""
    model, (a, b, c) = attached(variant).model, (ids(n, 1, seed=n) for n in (11, 20, 3))
    positions = torch.cat([torch.arange(x.shape[1]) for x in (a, b, c)])[None]
    packed = probe.forward(
        model, torch.cat([a, b, c], 1), position_ids=positions, use_cache=use_cache
    )
    context = model.get_base_model().bem_runtime.ambient.last
    control = context.control_per_token(0)
    start = 0
    for document in (a, b, c):
        alone = probe.forward(model, document, use_cache=False).logits
        stop = start + document.shape[1]
        own = model.get_base_model().bem_runtime.ambient.last.control_per_token(0)
        if not use_cache:
            assert (packed.logits[:, start:stop] - alone).abs().max() < TOLERANCE
            assert (control[:, start:stop] - own).abs().max() < TOLERANCE
        start = stop


def test_a_cache_that_packed_documents_filled_cannot_be_continued():
    model, x = attached().model, ids(12, 1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    cache = probe.forward(model, x, position_ids=positions, use_cache=True).past_key_values
    with pytest.raises(CacheError, match="2 documents are packed into 1 rows"):
        probe.forward(model, x[:, :1], past_key_values=cache)


def test_a_right_padded_prompt_starts_its_turn_at_its_last_token():
    model, prompt = attached().model, ids(12)
    mask = torch.ones_like(prompt)
    mask[1, 9:] = 0
    generate(model, prompt, attention_mask=mask, max_length=None)
    cache = probe.forward(model, prompt, attention_mask=mask, use_cache=True).past_key_values
    assert cache.layers[-1].applied()[0][1].max() == 2  # without generate: chunks of 8 alone
    seen = []
    handle = (
        model.get_base_model()
        .model.layers[1]
        .register_forward_hook(
            lambda *_: seen.append(model.get_base_model().bem_runtime.ambient.context)
        )
    )
    model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=1, pad_token_id=0)
    handle.remove()
    slots = seen[0].slot.view(2, 12)
    begins = (slots[:, 1:] != slots[:, :-1]).nonzero().tolist()
    assert [0, 10] in begins and [1, 7] in begins  # columns 11 and 8: the last real ones


@pytest.mark.parametrize("name", ["turn_starts", "route"])
def test_marks_of_another_shape_than_the_prompt_are_refused(name):
    with pytest.raises(AttachError, match=f"{name} .* must begin with the shape of the prompts"):
        generate(attached().model, ids(20), **{name: torch.zeros(2, 7, dtype=torch.bool)})


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_adapter_names_are_refused(call):
    model = attached("s0").model
    names = {"adapter_names": ["__base__", "default"]}
    with pytest.raises((AttachError, ValueError)):
        model(input_ids=ids(5), **names) if call == "forward" else generate(model, ids(5), **names)


def test_conditioning_is_evidence_by_another_name_and_unknown_names_are_refused():
    model, x = attached("v2").model, ids(12)
    known = torch.rand(2, 8)
    assert torch.equal(
        probe.forward(model, x, evidence=known).logits,
        probe.forward(model, x, evidence=None, conditioning={"evidence": known}).logits,
    )
    with pytest.raises(AttachError, match="unknown conditioning 'weather'"):
        probe.forward(model, x, conditioning={"weather": known})
    with pytest.raises(AttachError, match="given twice"):
        probe.forward(model, x, evidence=known, conditioning={"evidence": known})


def test_no_conditioning_is_exactly_conditioning_of_zero():
    model, x = attached("v2").model, ids(30)
    nothing = probe.forward(model, x, evidence=None).logits
    assert torch.equal(nothing, probe.forward(model, x, evidence=torch.zeros(2, 8)).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["s0", "v3", *VARIANTS])
def test_the_dtype_may_change_after_attaching(dtype, variant):
    model = attached(variant).model.to(dtype)
    logits = probe.logits(model, ids(20))
    assert logits.dtype == dtype and torch.isfinite(logits).all()


def test_a_cache_filled_under_other_weights_is_refused():
    attached_, x = attached(), ids(20)
    cache = probe.forward(attached_.model, x, use_cache=True).past_key_values
    with torch.no_grad():
        attached_.parameters()[0].add_(0.1)
    with pytest.raises(CacheError, match="filled under weights"):
        probe.forward(attached_.model, x[:, :1], past_key_values=cache)


def test_a_cache_filled_under_an_adapter_is_refused_without_it():
    attached_, x = attached(), ids(20)
    cache = probe.forward(attached_.model, x, use_cache=True).past_key_values
    with attached_.model.disable_adapter(), pytest.raises(CacheError, match="switched off"):
        probe.forward(attached_.model, x[:, :1], past_key_values=cache)


@pytest.mark.parametrize("variant", ["s0", "v4"])
def test_what_must_be_last_runs_behind_film_and_stays_when_the_adapter_is_off(variant):
    attached_, x, order = attached(variant), ids(9), []
    film = next((m for m in attached_.modules() if hasattr(m, "modulate")), None)
    if film is not None:
        modulate = film.modulate
        film.modulate = lambda *a: (order.append("film"), modulate(*a))[1]

    def last(block, hidden):
        order.append("last")
        return hidden * 0

    block = 1 if variant == "v4" else 2
    add_last_stage(attached_.base, block, last, rewire)
    on = probe.logits(attached_.model, x)
    assert order == (["film", "last"] if film is not None else ["last"])
    order.clear()
    with attached_.model.disable_adapter():
        off = probe.logits(attached_.model, x)
    assert order == ["last"] and torch.isfinite(on).all() and torch.isfinite(off).all()
    order.clear()
    probe.logits(attached_.model, x)
    assert order[-1] == "last"


def test_two_forward_passes_before_one_backward_under_checkpointing_are_right():
    attached_ = attached()
    attached_.model.train()
    batches = [ids(20, seed=1), ids(20, seed=2)]

    def gradients(together):
        for p in attached_.parameters():
            p.grad = None
        losses = []
        for n, batch in enumerate(batches):
            torch.manual_seed(n)
            loss = attached_.model(input_ids=batch, labels=batch, use_cache=False).loss
            losses.append(loss)
            if not together:
                loss.backward()
        if together:
            sum(losses).backward()
        return [p.grad.clone() for p in attached_.parameters() if p.grad is not None]

    plain = gradients(together=False)
    attached_.base.gradient_checkpointing_enable({"use_reentrant": False})
    attached_.base.enable_input_require_grads()
    for a, b in zip(plain, gradients(together=True), strict=True):
        assert (a - b).abs().max() < TOLERANCE


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_the_heads_put_out_is_let_go_once_it_was_read(use_cache):
    """It is as large as the hidden states of all tokens, and a pass lives on as the last one."""
    attached_ = attached("pt1")
    seen = []
    before = attached_.base.bem_runtime.wiring.controller.features
    attached_.base.bem_runtime.wiring.controller.features = lambda *given: (
        seen.append(weakref.ref(given[1])) or before(*given)
    )
    probe.forward(attached_.model, ids(20), use_cache=use_cache)
    assert len(seen) == 1 and seen[0]() is None
    assert attached_.base.bem_runtime.ambient.last.head_input is None


def test_a_linear_attention_layer_may_be_the_router_layer():
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    model = probe.perturbed(
        bem.attach(Qwen3NextForCausalLM(config).eval(), "v1", rank=4, chunk_size=8)
    ).model
    x = ids(20)
    whole = probe.forward(model, x, use_cache=False).logits
    first = probe.forward(model, x[:, :13], use_cache=True)
    rest = probe.forward(model, x[:, 13:14], past_key_values=first.past_key_values)
    assert (torch.cat([first.logits, rest.logits], 1) - whole[:, :14]).abs().max() < TOLERANCE


def bert():
    """Its decoder is handed a mask that the model has made, of four dimensions."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, is_decoder=True, initializer_range=0.2,
    )  # fmt: skip
    return probe.perturbed(
        bem.attach(BertLMHeadModel(config).eval(), "v1", rank=4, chunk_size=8)
    ).model


def test_a_mask_that_the_model_made_of_nothing_means_no_padding():
    model, x = bert(), ids(20)
    whole = probe.forward(model, x, use_cache=False).logits
    first = probe.forward(model, x[:, :13], use_cache=True)
    rest = probe.forward(model, x[:, 13:], past_key_values=first.past_key_values).logits
    assert (torch.cat([first.logits, rest], 1) - whole).abs().max() < TOLERANCE


@pytest.mark.parametrize("by_name", [True, False])
def test_what_is_padding_is_told_by_the_mask_of_the_call(by_name):
    model, x = bert(), ids(20, 1)
    padded, mask = torch.cat([x[:, :4], x], 1), torch.ones(1, 24, dtype=torch.long)
    mask[:, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if by_name:
        given = model(input_ids=padded, attention_mask=mask, position_ids=positions)
    else:
        given = model(padded, mask, position_ids=positions)
    assert (given.logits[:, 4:] - probe.logits(model, x)).abs().max() < TOLERANCE


def test_a_mask_that_does_not_tell_padding_is_refused():
    with pytest.raises(AttachError, match="2-D attention mask"):
        bert()(input_ids=ids(20), attention_mask=torch.zeros(2, 1, 20, 20))


@pytest.mark.parametrize("variant", ["v1", "v4"])
def test_a_prompt_of_a_model_that_drops_tokens_on_the_way_up_is_adapted_whole(variant):
    """Gemma 4 runs the layers that share keys on the last token alone, when only that is asked for."""
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, initializer_range=0.2,
    )  # fmt: skip
    model = probe.perturbed(
        bem.attach(Gemma4ForCausalLM(config).eval(), variant, rank=4, chunk_size=8)
    ).model
    x = ids(20)
    last = probe.forward(model, x, logits_to_keep=1).logits
    assert last.shape[1] == 1
    assert (last - probe.logits(model, x)[:, -1:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("variant", ["v1", "v4"])
def test_blocks_may_compute_in_bfloat16_under_a_residual_stream_in_float32(variant):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, state_size=8)
    model = MambaForCausalLM(config).to(torch.bfloat16).eval()
    attached_ = probe.perturbed(bem.attach(model, variant, rank=4, chunk_size=8))
    seen = []
    attached_.base.backbone.layers[2].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].dtype)
    )
    prompt = ids(13)
    logits = generate(attached_.model, prompt)
    assert set(seen) == {torch.float32}, "this model no longer shows it"
    whole = torch.cat([prompt, logits.argmax(-1)], 1)
    turns = torch.zeros_like(whole, dtype=torch.bool)
    turns[:, 12] = True
    plain = probe.forward(attached_.model, whole, turn_starts=turns, use_cache=False).logits[
        :, 12:-1
    ]
    assert (logits - plain).abs().max() < 0.1 * plain.abs().max()


def test_a_block_may_return_a_list():
    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    model = OpenAIGPTLMHeadModel(config).eval()
    before = probe.logits(model, ids(20))
    attached_ = bem.attach(model, "v4", rank=4, chunk_size=8)
    attached_.model.eval()
    assert torch.equal(probe.logits(attached_.model, ids(20)), before)
    assert not torch.equal(probe.logits(probe.perturbed(attached_).model, ids(20)), before)


def test_memory_of_pooling_grows_with_the_tokens_and_not_with_their_square():
    """16 times the tokens in one pass: less than 32 times the bytes that routing asks for."""
    from torch.profiler import ProfilerActivity, profile

    def allocated(tokens):
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=1 << 20,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        reader = bem.attach(model, "v4", rank=2).base.bem_runtime.wiring.controller
        features = torch.zeros(1, tokens, reader.width)
        valid = torch.ones(1, tokens, dtype=torch.bool)
        before = reader.start(1, 1, torch.device("cpu"))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            reader.pool(features, valid, None, before, -(-tokens // 64))
        return sum(max(e.self_cpu_memory_usage, 0) for e in seen.events())

    assert allocated(65536) < 32 * allocated(4096)
