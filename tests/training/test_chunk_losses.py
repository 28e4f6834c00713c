"""A chunk's losses equal losses that are computed one by one."""

import numpy as np
import pytest
import torch

import bem.training.chunk_losses as module
from bem.config import CloningConfig
from bem.training.chunk_losses import chunk_numbers
from bem.training.data import Example, collate, encode
from bem.training.traces import trace
from tests.conftest import make_llama, make_tokenizer
from tests.routing.mounted import mounted

READ = ("input_ids", "attention_mask", "turn_starts", "route")


def conversation(number: int = 0) -> Example:
    return Example(
        f"row-{number}",
        "name the function " + "that returns the value " * number,
        ("return the value",),
        history=(("this docstring", "describes the function"),),
    )


@pytest.fixture(scope="module")
def traced():
    tokenizer, model = make_tokenizer(), mounted(make_llama())
    rows = [encode(conversation(n), tokenizer, 256) for n in range(3)]
    return model, rows, trace(model, rows, 0, CloningConfig(switch_cost=0.1))


def test_a_chunk_loses_the_mean_nll_of_its_turns_answer_tokens(traced):
    model, rows, traces = traced
    batch = collate([rows[1]], 0)
    for option in range(4):
        given = {**batch, "route": torch.full_like(batch["input_ids"], option)}
        with torch.inference_mode():
            logits = model.model(**{k: given[k] for k in READ}, use_cache=False).logits
        labels = batch["labels"][0]
        nll = torch.nn.functional.cross_entropy(logits[0, :-1], labels[1:], reduction="none")
        turn = batch["turn_starts"][0].long().cumsum(0)[:-1]
        for number in (1, 2):  # the two turns' answers
            answer = (turn == number) & (labels[1:] != -100)
            expected = float(nll[answer].mean())
            chunks = chunk_numbers(batch, 8)[0, :-1][answer].unique() - 1
            assert traces.experts[1, chunks, option].sum() == pytest.approx(expected, abs=1e-4)


def test_padding_chunks_lose_nothing(traced):
    _, _, traces = traced
    for row, n in enumerate(traces.chunks):
        assert not traces.experts[row, n:].any()
        assert traces.turns[row, :n].sum() == 2


def test_dropout_of_a_model_that_was_left_in_training_mode_has_no_part_in_them(traced):
    _, rows, traces = traced
    base = make_llama(attention_dropout=0.5)
    model = mounted(base)
    model.model.train()
    again = trace(model, rows, 0, CloningConfig(switch_cost=0.1))
    assert (again.experts == traces.experts).all() and model.model.training


def test_they_are_the_same_to_the_bit_where_the_blocks_below_the_experts_are_read_each_time(
    traced, monkeypatch
):
    model, rows, traces = traced
    assert model.router_config.router_layer == 1, "there are blocks below"
    monkeypatch.setattr(module, "KEPT", 0)
    again = trace(model, rows, 0, CloningConfig(switch_cost=0.1))
    for name, value in vars(traces).items():
        np.testing.assert_array_equal(value, getattr(again, name), err_msg=name)
