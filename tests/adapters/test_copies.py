"""A copy shares the weights, and an adapter can be left out of it."""

import pytest
import torch

import bem
from bem.adapters.copies import with_shared_weights, without_adapter
from tests.routing.mounted import mounted

IDS = torch.arange(2, 42)[None]
VARIANTS = ["s0", "pt1", "v1", "v2", "v3", "v4", "routed"]


def test_two_adapters_on_two_copies_do_not_see_each_other(micro_llama):
    said = micro_llama(input_ids=IDS).logits
    other = with_shared_weights(micro_llama)
    mounted(micro_llama)
    assert torch.equal(other(input_ids=IDS).logits, said)
    one, two = micro_llama.lm_head.weight, other.lm_head.weight
    assert one is two


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_base_can_be_copied_from_under_an_adapter_that_was_just_trained(micro_llama, variant):
    bare = micro_llama(input_ids=IDS).logits
    attached = mounted(micro_llama) if variant == "routed" else bem.attach(micro_llama, variant)
    for parameter in attached.parameters():
        parameter.data += 0.01
    said = attached.model(input_ids=IDS).logits  # leaves tensors with a graph in the adapter
    plain = without_adapter(attached)
    assert torch.equal(plain(input_ids=IDS).logits, bare)
    assert torch.equal(attached.model(input_ids=IDS).logits, said)
    assert type(plain) is type(micro_llama) and not getattr(plain, "peft_config", None)
    weights = {id(p) for p in attached.base.parameters()}
    assert all(id(p) in weights for p in plain.parameters())
    again = bem.attach(plain, "v1", rank=2)  # it can carry another adapter, and generate
    written = [m.generate(input_ids=IDS, max_new_tokens=3) for m in (again.model, attached.model)]
    assert all(w.shape == (1, IDS.shape[1] + 3) for w in written)
    assert torch.equal(attached.model(input_ids=IDS).logits, said)
