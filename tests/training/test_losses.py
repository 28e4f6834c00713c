"""Logits and their loss are computed where answers are, and are those of a whole forward pass."""

import pytest
import torch

from bem.training.data import Example, collate, encode
from bem.training.losses import (
    answer_columns,
    answer_logits,
    answer_nll,
    answer_targets,
    token_nll,
)


def test_columns_and_targets_of_a_hand_made_batch():
    labels = torch.tensor([[-100, -100, 7, -100, 5], [-100, -100, -100, 4, -100]])
    assert answer_columns(labels).tolist() == [1, 2, 3]  # each predicts the token behind it
    assert answer_targets(labels).tolist() == [[7, -100, 5], [-100, 4, -100]]
    nothing = torch.tensor([[3, -100]])  # the first token of a row has no prediction
    assert answer_columns(nothing).tolist() == [] and answer_targets(nothing).shape == (1, 0)


def test_a_token_costs_minus_its_log_probability():
    logits = torch.tensor([[[0.0, 0.0], [1.0, 5.0]]])
    nll = token_nll(logits, torch.tensor([[1, -100]]))
    assert nll.tolist() == [[pytest.approx(0.693147), 0.0]]
    sums, counts = answer_nll(logits.bfloat16(), torch.tensor([[1, 1]]))
    assert float(sums) == pytest.approx(0.693147 + 0.018150, abs=1e-5) and counts.tolist() == [2]
    assert sums.dtype == torch.float32


@pytest.fixture
def batch(tokenizer):
    """Answers of two turns, in rows of different lengths."""
    rows = [
        Example(str(n), "name the value " * n, ("return",), history=(("this", "describes"),))
        for n in (1, 3)
    ]
    return collate([encode(row, tokenizer, 128) for row in rows], 0)


def test_logits_are_computed_at_the_answers_alone_and_are_those_of_a_whole_pass(micro_llama, batch):
    seen = []
    micro_llama.lm_head.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    with torch.no_grad():
        some = answer_logits(micro_llama, batch)
        given = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}
        whole = micro_llama(**given).logits
    columns = answer_columns(batch["labels"])
    assert seen[0] == len(columns) < seen[1] == batch["labels"].shape[1]
    assert not torch.equal(columns, columns[0] + torch.arange(len(columns)))  # two turns: a gap
    torch.testing.assert_close(some, whole[:, columns])


def test_a_model_that_computes_all_logits_gives_the_same_ones(micro_llama, batch, monkeypatch):
    inner = type(micro_llama).forward
    with torch.no_grad():
        some = answer_logits(micro_llama, batch)

        def forward(self, input_ids, attention_mask, position_ids, **rest):
            return inner(self, input_ids, attention_mask, position_ids, **rest)

        monkeypatch.setattr(type(micro_llama), "forward", forward)
        torch.testing.assert_close(answer_logits(micro_llama, batch), some)
