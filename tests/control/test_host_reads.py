"""While tokens are decoded nothing is read back from the device."""

import pytest
import torch

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import VOCAB, tiny_model
from tests.conftest import make_llama
from tests.host_reads import noted
from tests.routing.mounted import mounted

PROMPT = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(3))


def decode(model, steps):
    """Notes of each decoded token of a `generate`, the prompt left out."""
    passes: list[int] = []
    base = model.get_base_model()
    greedy = dict(max_new_tokens=steps, do_sample=False, pad_token_id=0, eos_token_id=None)
    with noted() as notes:
        begin = base.register_forward_pre_hook(lambda *_: passes.append(len(notes)), prepend=True)
        model.generate(input_ids=PROMPT, **greedy)
    begin.remove()
    assert len(passes) == steps
    return notes[passes[1] :]


@pytest.mark.parametrize("variant", ["s0", "pt1", "v1", "v2", "v3", "v4"])
def test_decoding_reads_nothing_back_inside_chunks_and_at_their_ends(variant):
    attached = probe.perturbed(bem.attach(tiny_model("llama"), variant, rank=4, chunk_size=8))
    decode(attached.model, 3)
    assert decode(attached.model, 24) == []  # three chunks of 8


def test_a_router_decides_and_composes_without_reading_back():
    routed = mounted(make_llama())
    decode(routed.model, 3)
    assert decode(routed.model, 24) == []


def test_the_note_taker_notes():
    with noted() as notes:
        from bem.control.chunks import slots_needed

        slots_needed(4, torch.ones(1, 4, dtype=torch.bool), 2)
    assert any("control/chunks.py" in note for note in notes)
