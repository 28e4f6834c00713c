"""Control lives with the cache: what can be done to a cache, and what is refused."""

import copy

import pytest
import torch
from transformers import DynamicCache

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks import TOLERANCE
from bem.adapters.checks_models import VOCAB, tiny_model
from bem.control.cache import ControlLayer
from bem.errors import CacheError
from tests.conftest import make_llama


def attached(variant="v1", **settings):
    return probe.perturbed(
        bem.attach(tiny_model("llama"), variant, rank=4, chunk_size=8, **settings)
    )


def ids(tokens, rows=2):
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(3))


def close(a, b):
    return (a - b).abs().max() < TOLERANCE


def test_there_is_one_control_layer_behind_the_key_value_layers():
    _, cache = probe.piece(attached().model, ids(20), None)
    assert [isinstance(layer, ControlLayer) for layer in cache.layers] == [False] * 4 + [True]
    assert cache.get_seq_length() == 20 and cache.layers[-1].get_seq_length() == 20


def test_a_lazily_grown_cache_works_too():
    model, cache = attached().model, DynamicCache()
    first, cache = probe.piece(model, ids(30)[:, :17], cache)
    rest, _ = probe.piece(model, ids(30)[:, 17:], cache)
    assert close(torch.cat([first, rest], 1), probe.logits(model, ids(30)))


def test_a_static_adapter_adds_nothing_to_the_cache():
    _, cache = probe.piece(attached("s0").model, ids(20), None)
    assert not any(isinstance(layer, ControlLayer) for layer in cache.layers)


@pytest.mark.parametrize("variant", ["pt1", "v1", "v4"])
@pytest.mark.parametrize("keep", [8, 96, 150, 190, 199])
def test_a_cropped_cache_continues_as_if_never_longer(variant, keep):
    model, tokens = attached(variant).model, ids(200)
    cache = None
    for a, b in ((0, 60), (60, 61), (61, 62), (62, 180), *((t, t + 1) for t in range(180, 200))):
        _, cache = probe.piece(model, tokens[:, a:b], cache)
    probe.crop(cache, 200, keep)
    rest, _ = probe.piece(model, tokens[:, keep:], cache)
    assert close(rest, probe.logits(model, tokens)[:, keep:])


def test_a_crop_that_cannot_be_exact_is_refused_and_says_where_it_can():
    model = attached().model
    _, cache = probe.piece(model, ids(300), None)
    with pytest.raises(
        CacheError, match=r"cannot crop to 11 tokens.*chunk boundary \(row 0: \[8, 16"
    ):
        cache.layers[-1].crop(11 - 300)


def test_rows_can_be_selected_and_repeated():
    model, tokens = attached().model, ids(40, rows=3)
    full = probe.logits(model, tokens)
    _, cache = probe.piece(model, tokens[:, :21], None)
    _, cache = probe.piece(model, tokens[:, 21:22], cache)
    picked = copy.deepcopy(cache)
    picked.batch_select_indices(torch.tensor([2, 0]))
    rest, _ = probe.piece(model, tokens[[2, 0], 22:], picked)
    assert close(rest, full[[2, 0], 22:])
    cache.batch_repeat_interleave(2)
    rest, _ = probe.piece(model, tokens.repeat_interleave(2, 0)[:, 22:], cache)
    assert close(rest, full.repeat_interleave(2, 0)[:, 22:])


@pytest.mark.parametrize("variant", ["pt1", "v4"])
def test_rows_repeated_while_a_chunk_is_decoded_go_on_each_as_it_would_alone(variant):
    model, tokens = attached(variant).model, ids(24)
    repeated = tokens.repeat_interleave(8, 0)
    full = probe.logits(model, tokens).repeat_interleave(8, 0)
    _, cache = probe.piece(model, tokens[:, :17], None)
    for at in (17, 18):  # inside the chunk of 8, which its members were made ready for
        _, cache = probe.piece(model, tokens[:, at : at + 1], cache)
    cache.batch_repeat_interleave(8)
    for at in (19, 20):
        found, cache = probe.piece(model, repeated[:, at : at + 1], cache)
        assert close(found[:, 0], full[:, at])


def test_a_reset_cache_starts_anew():
    model, tokens = attached().model, ids(30)
    _, cache = probe.piece(model, ids(20), None)
    cache.reset()
    again, _ = probe.piece(model, tokens, cache)
    assert close(again, probe.logits(model, tokens))


def test_a_cache_filled_without_the_adapter_is_refused():
    one = attached()
    with one.model.disable_adapter():
        _, cache = probe.piece(one.model, ids(10), None)
    with pytest.raises(CacheError, match="holds 10 tokens of which adapter 'default' has seen 0"):
        probe.piece(one.model, ids(5), cache)


def test_past_control_is_never_revised():
    model, tokens = attached().model, ids(60)
    _, cache = probe.piece(model, tokens[:, :30], None)
    number, controls = cache.layers[-1].applied()
    for t in range(30, 60):
        _, cache = probe.piece(model, tokens[:, t : t + 1], cache)
    later_number, later = cache.layers[-1].applied()
    assert (
        torch.equal(later_number[:, :30], number) and later_number.max() == 8
    )  # 60 tokens, chunks of 8
    assert torch.equal(later[:, : controls.shape[1]], controls)


def test_a_conversation_continues_behind_its_cache():
    """Second turn on the first turn's cache = both turns in one forward without cache."""
    model = attached().model
    model.generation_config.eos_token_id = None
    settings = dict(
        max_new_tokens=11, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    first = ids(13, rows=1)
    with torch.no_grad():
        one = model.generate(input_ids=first, attention_mask=torch.ones_like(first), **settings)
        second = torch.cat([one.sequences, ids(9, rows=1)], 1)
        two = model.generate(
            input_ids=second,
            attention_mask=torch.ones_like(second),
            past_key_values=one.past_key_values,
            output_logits=True,
            **settings,
        )
    turns = torch.zeros_like(two.sequences, dtype=torch.bool)
    turns[:, [12, second.shape[1] - 1]] = True
    plain = probe.forward(model, two.sequences, turn_starts=turns, use_cache=False).logits
    got = torch.stack(two.logits, 1)
    assert close(got, plain[:, second.shape[1] - 1 : -1])


def test_generate_takes_earlier_turn_starts():
    """A whole conversation as one prompt, its turns marked = the same conversation held turn by turn."""
    model = attached().model
    model.generation_config.eos_token_id = None
    prompt = ids(40, rows=2)
    turns = torch.zeros_like(prompt, dtype=torch.bool)
    turns[:, [9, 21]] = True
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            turn_starts=turns,
            max_new_tokens=6,
            num_beams=2,
            do_sample=False,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
    marked = torch.zeros_like(out.sequences, dtype=torch.bool)
    marked[:, [9, 21, 39]] = True
    plain = probe.forward(model, out.sequences, turn_starts=marked, use_cache=False).logits
    wanted = plain[:, 39:-1].log_softmax(-1).gather(-1, out.sequences[:, 40:, None])[..., 0]
    got = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    assert close(got, wanted)


def test_prompt_lookup_decoding_crops_the_cache_and_stays_exact():
    """Assisted generation rejects drafted tokens by cropping: greedy output must not change."""
    model = attached().model
    model.generation_config.eos_token_id = None
    prompt = ids(12, rows=1).repeat(1, 3)
    settings = dict(
        max_new_tokens=30, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(prompt)
    )
    with torch.no_grad():
        plain = model.generate(input_ids=prompt, **settings)
        assisted = model.generate(input_ids=prompt, prompt_lookup_num_tokens=4, **settings)
    assert torch.equal(plain, assisted)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["v1", "v4"])
def test_a_prompt_of_8000_tokens_is_read_in_one_go_or_in_pieces(variant):
    """In bfloat16, with a piece that is longer than the features that a sequence keeps."""
    model = make_llama(
        max_position_embeddings=8192,
        num_hidden_layers=2,
        rope_parameters={"rope_theta": 1e5, "rope_type": "default"},
    ).to(torch.bfloat16)
    ids = torch.randint(2, 320, (1, 8000), generator=torch.Generator().manual_seed(0))
    plain = _in_pieces(model, ids)
    attached = bem.attach(model, variant, rank=4, router_layer=0)
    for parameter in attached.parameters():
        parameter.data += 0.1 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(1)
        )
    adapted = _in_pieces(attached.model, ids)
    assert float((adapted[0] - plain[0]).abs().max()) > 0.05  # it does something
    off = [float((whole - pieces).abs().max()) for whole, pieces in (plain, adapted)]
    assert off[1] <= max(2 * off[0], 2**-6)  # bfloat16: logits of about 1


def _in_pieces(model, ids):
    """Last logits of a prompt in one go, and in uneven pieces."""
    whole = model(ids, logits_to_keep=8).logits.float()
    cache, at = None, 0
    for size in (3000, 37, 1, 4000, 962):
        out = model(ids[:, at : at + size], past_key_values=cache, use_cache=True, logits_to_keep=8)
        cache, at = out.past_key_values, at + size
    assert at == ids.shape[1]
    return whole, out.logits.float()
