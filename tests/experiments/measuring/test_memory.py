"""The memory of an arm is what it adds to the bare base, weights of the base aside."""

import pytest
import torch
from torch import nn

import bem
from bem.adapters.copies import with_shared_weights
from bem.experiments.measuring import memory as module
from bem.experiments.measuring.memory import added_memory, peak_activations, weight_bytes
from bem.variants.head_gate import HeadGate

WORK = {"prompt_tokens": 64, "new_tokens": 4}


class Holding(nn.Module):
    """A base that holds 1,000 floats for ever, and 2,000 more while it works."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.device = inner, inner.config, inner.device
        self.register_buffer("kept", torch.zeros(1000))

    def forward(self, input_ids, logits_to_keep=0, **given):
        scratch = torch.ones(2000)
        output = self.inner(input_ids=input_ids, logits_to_keep=logits_to_keep, **given)
        assert scratch[0] == 1
        return output


def test_parameters_buffers_and_what_is_held_at_work_count_and_the_base_does_not(micro_llama):
    arms = {"bare": with_shared_weights(micro_llama), "holding": Holding(micro_llama)}
    assert added_memory(arms, micro_llama, **WORK) == {"bare": 0.0, "holding": 12_000.0}


class Deriving(nn.Module):
    """A base that makes 50,000 floats when it decodes its first token, and keeps them."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.device = inner, inner.config, inner.device
        self.derived = []

    def forward(self, input_ids, logits_to_keep=0, **given):
        if input_ids.shape[1] == 1 and not self.derived:
            self.derived.append(torch.ones(50_000))
        return self.inner(input_ids=input_ids, logits_to_keep=logits_to_keep, **given)


def test_what_decoding_leaves_behind_is_charged_beside_the_next_prefill(micro_llama):
    arms = {"deriving": Deriving(micro_llama)}
    assert added_memory(arms, micro_llama, **WORK) == {"deriving": 200_000.0}


@pytest.mark.parametrize("variant", ["pt1", "v1", "v2"])
def test_a_head_gated_variant_leaves_less_behind_than_its_v(micro_llama, variant):
    attached = bem.attach(with_shared_weights(micro_llama), variant, rank=8)
    with module._LiveBytes() as live:
        module.two_sequences(attached.model.eval(), torch.zeros((1, 64), dtype=torch.long), 4)
    gates = [m for m in attached.model.modules() if isinstance(m, HeadGate)]
    assert live.now < sum(m.v.nbytes for m in gates)


@pytest.mark.parametrize("variant", ["s0", "v1", "v4"])
def test_an_adapter_adds_more_than_its_parameters_and_far_less_than_the_base(micro_llama, variant):
    attached = bem.attach(with_shared_weights(micro_llama), variant, rank=2)
    (added,) = added_memory({variant: attached}, micro_llama, **WORK).values()
    own = 4 * sum(p.numel() for p in attached.parameters())
    assert own <= added < weight_bytes(micro_llama)


def test_added_memory_is_the_same_every_time(micro_llama):
    def once():
        attached = bem.attach(with_shared_weights(micro_llama), "v1", rank=2)
        return added_memory({"v1": attached}, micro_llama, **WORK)

    assert once() == once()


def test_live_bytes_by_hand():
    with module._LiveBytes() as live:
        a = torch.ones(1000)  # 4,000 bytes
        b = a + a  # 8,000 at once
        del a
        assert live.now == 4000
        b.add_(1)  # in place: nothing new
        c = b.view(10, 100)[2:]  # a view: nothing new
        assert (live.now, live.peak) == (4000, 8000)
        del b, c
    assert (live.now, live.peak) == (0, 8000)


def test_the_peak_grows_with_the_batch_and_holds_the_cache(micro_llama):
    one = peak_activations(micro_llama, **WORK)
    assert peak_activations(micro_llama, **WORK, batch_size=4) > one
    cache = 2 * 4 * 68 * 2 * 8 * 4  # keys and values, layers, tokens, heads, head size, bytes
    assert one > cache


def test_shared_weights_count_once(micro_llama):
    attached = bem.attach(with_shared_weights(micro_llama), "s0", rank=2)
    adapter = sum(p.numel() * 4 for p in attached.parameters())
    assert weight_bytes(attached.model) == weight_bytes(micro_llama) + adapter
