"""Four bits a weight: the file's own blocks, exactly; the faster form by rows; everything else as before."""

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bem
from bem.adapters.version import base_digest
from bem.bases.int4 import FEW, GROUP, Int4Linear, dequantised, quantised, with_int4
from bem.errors import BaseError, BaseMismatch
from tests.conftest import make_llama


def blocks(rows=48, columns=64, seed=0):
    """A weight as a Q4_1 file holds it: every block uses its smallest and its largest level."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(
        0, 16, (rows, columns // GROUP, GROUP), generator=generator, dtype=torch.int32
    )
    q[..., 0], q[..., 1] = 0, 15
    d = (torch.rand(rows, columns // GROUP, generator=generator) * 0.01 + 0.001).half().float()
    m = (-7.3 * d).half().float()
    return q.view(rows, columns), d, m


def model_of(dtype):
    model = make_llama(hidden_size=64, intermediate_size=128).to(dtype)
    return model.eval()


def both():
    """(bfloat16, four bits) of one model whose layers are blocks."""
    exact = model_of(torch.float32)
    with torch.no_grad():
        for number, module in enumerate(exact.modules()):
            if isinstance(module, nn.Linear) and module is not exact.lm_head:
                module.weight.copy_(dequantised(*blocks(*module.weight.shape, seed=number)))
    plain, made = model_of(torch.float32), model_of(torch.float32)
    for each in (plain, made):
        each.load_state_dict(exact.state_dict())
        each.to(torch.bfloat16)
    return plain, with_int4(made, exact)


def test_blocks_of_a_file_are_taken_as_they_are():
    q, d, m = blocks()
    weight = dequantised(q, d, m)
    again = quantised(weight)
    assert torch.equal(again[0], q) and torch.equal(again[1], d) and torch.equal(again[2], m)


def test_a_block_of_equal_numbers_is_itself():
    weight = torch.full((16, GROUP), 0.25)
    assert torch.equal(dequantised(*quantised(weight)), weight)


@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_and_many_rows_compute_the_same_layer(bias):
    """Both forms against float64, within what bfloat16 rounds."""
    linear = nn.Linear(64, 48, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(dequantised(*blocks()))
    layer = Int4Linear.of(linear)
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    right = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    few = torch.cat([layer(x[i : i + FEW]) for i in range(0, 32, FEW)])
    scale = float(right.detach().abs().max())
    for form in (few, layer(x)):
        assert float((form.double() - right).abs().max().detach()) < 2**-7 * scale
    assert layer(x[:2].view(2, 1, 64)).shape == (2, 1, 48)


def test_the_four_bits_are_what_computes_few_rows_and_nothing_else():
    linear = nn.Linear(64, 48, bias=False)
    layer = Int4Linear.of(linear)
    layer.weight.data.zero_()  # which nobody sees
    assert float(layer(torch.ones(FEW, 64, dtype=torch.bfloat16)).abs().max()) > 0
    assert float(layer(torch.ones(FEW + 1, 64, dtype=torch.bfloat16)).abs().max()) == 0
    x = torch.ones(1, 64, dtype=torch.bfloat16, requires_grad=True)
    assert float(layer(x).abs().max()) == 0  # a gradient passes through the plain form alone
    layer.weight.data.normal_()
    layer(x).sum().backward()
    assert torch.equal(x.grad, layer.weight.sum(0, keepdim=True))


MERGES = {
    "as PEFT merges": lambda w: setattr(w, "data", w.data + 1),
    "in place": lambda w: w.add_(1),
    "an optimiser": lambda w: torch._foreach_add_([w], 1.0),
    "another tensor": lambda w: setattr(w, "data", torch.ones_like(w)),
}


@pytest.mark.parametrize("how", MERGES)
@torch.no_grad()
def test_a_weight_that_was_written_to_is_what_computes_few_rows_too(how):
    layer = Int4Linear.of(nn.Linear(64, 48, bias=False))
    x = torch.randn(FEW, 64, dtype=torch.bfloat16)
    before = layer(x)
    MERGES[how](layer.weight)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    assert not torch.equal(layer(x), before)


STAYS = {
    "moved": lambda layer: layer.to("cpu"),
    "cast to what it is": lambda layer: layer.to(torch.bfloat16),
    "cast and cast back": lambda layer: layer.float().bfloat16(),
    "frozen": lambda layer: layer.requires_grad_(False),
    "copied": copy.deepcopy,
    "loaded": lambda layer: layer.load_state_dict(copy.deepcopy(layer.state_dict())) and layer,
    "pickled": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("how", STAYS)
@torch.no_grad()
def test_what_changes_no_number_leaves_both_forms(how):
    layer = Int4Linear.of(nn.Linear(64, 48, bias=False))
    x = torch.randn(FEW, 64, dtype=torch.bfloat16)
    before = layer(x)
    assert not torch.equal(before, F.linear(x, layer.weight))  # so that the forms can be told apart
    assert torch.equal(STAYS[how](layer)(x), before)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, FEW + 1])
def test_both_forms_compile_without_a_break(rows):
    layer = Int4Linear.of(nn.Linear(64, 48))
    x = torch.randn(rows, 64, dtype=torch.bfloat16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_a_weight_that_is_trained_computes_alone():
    layer = Int4Linear.of(nn.Linear(64, 48, bias=False)).requires_grad_(True)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))


def test_many_rows_are_those_of_the_bfloat16_base_to_the_bit():
    plain, packed = both()
    ids = torch.randint(0, 320, (2, 12))
    with torch.inference_mode():
        assert torch.equal(plain(ids).logits, packed(ids).logits)


def test_decoding_through_the_cache_is_as_near_as_in_bfloat16():
    plain, packed = both()
    ids = torch.randint(0, 320, (1, 12))

    def off(model):
        with torch.inference_mode():
            whole, cache, steps = model(ids).logits, None, []
            for i in range(ids.shape[1]):
                out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
                cache, _ = out.past_key_values, steps.append(out.logits)
            return float((torch.cat(steps, 1) - whole).abs().max() / whole.abs().max())

    assert off(packed) < max(0.05, 3 * off(plain))


@pytest.mark.parametrize("variant", ["s0", "v1", "v3"])
def test_adapters_train_on_it_and_stand_on_it_alone(tmp_path, variant):
    plain, packed = both()
    assert base_digest(plain) != base_digest(packed)
    attached = bem.attach(packed, variant)
    ids = torch.randint(0, 320, (1, 12))
    loss = attached.model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in attached.parameters())
    attached.save(tmp_path / "a")
    assert attached.detach() is packed
    bem.load(packed, tmp_path / "a")
    with pytest.raises(BaseMismatch, match=r"in int4\+bfloat16.*dtype='int4'"):
        bem.load(plain, tmp_path / "a")


def test_weights_that_are_no_blocks_are_rounded_with_a_word(caplog):
    exact = model_of(torch.float32)
    with caplog.at_level(logging.WARNING, "bem.bases.int4"):
        made = with_int4(model_of(torch.bfloat16), exact)
    assert "weights were rounded by up to" in caplog.text
    layer = made.model.layers[0].mlp.down_proj
    q, d, m = quantised(exact.model.layers[0].mlp.down_proj.weight)
    assert torch.equal(layer.weight, dequantised(q, d, m).bfloat16())


def test_what_has_no_such_form_is_refused():
    tiny = make_llama(hidden_size=24, intermediate_size=40).to(torch.bfloat16)
    with pytest.raises(BaseError, match="no linear layer of 32 inputs"):
        with_int4(tiny, tiny)


def test_a_base_is_loaded_in_this_form_by_name():
    model, _ = bem.load_base("bem-tiny", dtype="int4")
    assert any(isinstance(module, Int4Linear) for module in model.modules())
    assert not isinstance(model.get_output_embeddings(), Int4Linear)
