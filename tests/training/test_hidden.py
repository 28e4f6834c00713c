"""What enters a layer, read without the layers above it."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bem.training.data import Example, encode
from bem.training.hidden import LowerBlocks, hidden_states
from tests.conftest import make_llama, make_tokenizer
from tests.routing.mounted import mounted


def make_gpt2():
    """Learned positions: a padded row must be told where it begins."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=320, n_positions=128, n_embd=32, n_layer=3, n_head=4)
    ).eval()


def rows(n=5):
    return [
        encode(Example(str(i), "return the value. " * (1 + i), ("that",)), make_tokenizer(), 400)
        for i in range(n)
    ]


def entering(model, row, layer) -> torch.Tensor:
    with torch.no_grad():
        out = model(torch.tensor([row.input_ids]), output_hidden_states=True)
    return out.hidden_states[layer][0]


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_they_are_those_of_the_whole_model_for_every_row_of_a_batch(make, layer):
    model = make()
    expected = [entering(model, row, layer) for row in rows()]
    for i, states in hidden_states(model, rows(), layer, 0, batch_size=2):
        torch.testing.assert_close(states, expected[i], atol=1e-5, rtol=1e-4)


def test_no_expert_has_a_part_in_them_and_the_model_is_whole_afterwards():
    model = make_llama()
    expected = [entering(model, row, 1) for row in rows()]
    routed = mounted(model, router_layer=1)
    ids = torch.tensor([rows()[0].input_ids])
    with torch.no_grad():
        before = routed.model(ids).logits
        names = [n for n, _ in routed.base.named_parameters()]
        for i, states in hidden_states(routed.base, rows(), 1, 0, 2):
            torch.testing.assert_close(states, expected[i], atol=1e-5, rtol=1e-4)
        assert torch.equal(routed.model(ids).logits, before)
    assert [n for n, _ in routed.base.named_parameters()] == names


def test_the_model_is_whole_after_an_error_too():
    model = make_llama()
    too_long = rows(1)
    too_long[0].input_ids[0] = 10**6
    with pytest.raises(IndexError):
        list(hidden_states(model, too_long, 1, 0))
    assert len(model.model.layers) == 4
    assert not model.model.layers[1]._forward_pre_hooks


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_lower_blocks_are_computed_once_and_give_the_same_logits_to_the_bit(make, layer):
    model, ids, computed = make(), torch.tensor([rows()[2].input_ids]), []
    lower = LowerBlocks(model, layer)
    for block in lower.blocks:
        inside = next(block.children())
        inside.register_forward_hook(lambda *_: computed.append(1))
    with torch.no_grad():
        with lower.giving(None) as given:
            first = model(ids).logits
        with lower.giving(given[0] if layer else None):
            second = model(ids).logits
    assert torch.equal(first, second) and len(given) == (layer > 0) and len(computed) == layer
    with pytest.raises(ZeroDivisionError), lower.giving(given[0] if layer else None):
        raise ZeroDivisionError
    with torch.no_grad():
        model(ids)
    assert len(computed) == 2 * layer, "the model is whole again"
