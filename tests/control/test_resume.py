"""A chunk that was read before stands for reading it."""

import pytest
import torch

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import tiny_model
from bem.control.resume import after_chunk, restore
from bem.control.state import ControlState
from bem.errors import CacheError

IDS = torch.arange(3, 31)[None]
TURNS = torch.zeros(1, 28, dtype=torch.bool)
TURNS[0, 13] = True
SPANS = [(0, 8), (8, 13), (13, 21)]  # chunks of 8, restarted at the turn


def state_after(tokens: int) -> ControlState:
    subject = probe.perturbed(bem.attach(tiny_model("llama"), "v1", rank=4, chunk_size=8))
    with torch.inference_mode():
        out = subject.model(
            input_ids=IDS[:, :tokens], turn_starts=TURNS[:, :tokens], use_cache=True
        )
    return out.past_key_values.layers[-1].state


def test_what_stands_behind_a_chunk_is_what_ran_when_it_was_read():
    whole = state_after(28)
    for number, (start, stop) in enumerate(SPANS, 1):
        then = state_after(stop).running
        for name, found in vars(after_chunk(whole, 0, number, start, stop)).items():
            torch.testing.assert_close(found, getattr(then, name), rtol=1e-4, atol=1e-5)
    last = after_chunk(state_after(21), 0, 3, 13, 21)  # nothing has begun behind it
    assert torch.equal(last.sums, state_after(21).running.sums)


def test_a_new_sequence_goes_on_behind_chunks_as_if_it_had_read_them():
    whole = state_after(28)
    chunks = [after_chunk(whole, 0, n, *span) for n, span in enumerate(SPANS, 1)]
    state = ControlState(whole.layout, 3, "cpu")
    state.begin()
    slot = state.begin()
    restore(state, slot, chunks)
    read = state_after(21)
    assert state.columns[slot] == 21 and state.boundaries(slot) == read.boundaries(0) == [8, 13]
    torch.testing.assert_close(state.history([slot]), read.history([0]))
    assert torch.equal(state.numbers([slot]), read.numbers([0]))
    for name, value in vars(state.running).items():
        torch.testing.assert_close(
            value[slot], getattr(read.running, name)[0], rtol=1e-4, atol=1e-5
        )
    with pytest.raises(CacheError, match="holds 21 tokens"):
        restore(state, slot, chunks)
    state.free(slot)
    assert state.begin() == slot and state.columns[slot] == 0 and not state.running.number[slot]


def test_padding_behind_a_piece_is_forgotten():
    state = state_after(28)
    state.drop_padding([0], [5])
    assert state.columns == [23] and state.valid[0].all()
    with pytest.raises(CacheError, match="inside a chunk"):
        state.crop([0], 22)
