"""A plan is what a router does within one turn."""

from dataclasses import astuple
from types import SimpleNamespace

import pytest

from bem.experiments.routing.transcript import _read, plan_lengths
from bem.routing.explain import Explained, explain
from bem.training.data import Example, encode
from tests.conftest import make_llama, make_tokenizer
from tests.engine.test_engine import lively
from tests.routing.mounted import mounted


def chunk(expert: str, turn: bool = False, rank: int = 2) -> Explained:
    return Explained(1, 0, 64, turn, expert, rank, 1.0, 0, 0.0, "", {}, 0.0)


@pytest.mark.parametrize(
    ("chunks", "lengths"),
    [
        ([chunk("a")], [1]),
        ([chunk("a"), chunk("a"), chunk("b")], [2]),
        ([chunk("a"), chunk("a", rank=1), chunk("a")], [3]),
        ([chunk("a"), chunk("a", turn=True), chunk("b", turn=True), chunk("c")], [1, 1, 2]),
        ([chunk("a", turn=True), chunk("b")], [2]),
    ],
)
def test_the_length_of_a_plan_is_its_number_of_different_actions_in_a_row(chunks, lengths):
    assert plan_lengths(chunks) == lengths


def test_conversations_that_are_read_in_batches_are_explained_as_each_alone():
    model, tokenizer = lively(mounted(make_llama(initializer_range=0.2))), make_tokenizer()
    rows = [
        Example(str(n), "name the function " * n, ("return the value",), history=(("this", "that"),) * n)
        for n in (3, 1, 2)
    ]  # fmt: skip
    artifacts = SimpleNamespace(
        encoded=lambda row: encode(row, tokenizer, 400),
        config=SimpleNamespace(eval_batch_size=2),
        inputs=SimpleNamespace(tokenizer=tokenizer, pad_id=0),
    )
    read = _read(model, artifacts, rows)
    assert [t.row for t in read] == rows
    experts = set()
    for transcript in read:
        encoded = artifacts.encoded(transcript.row)
        alone = explain(model, encoded.input_ids, encoded.turn_starts)
        for one, other in zip(transcript.chunks, alone, strict=True):
            exact, rounded = astuple(one)[:-2], astuple(other)[:-2]
            assert exact == rounded
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
            assert one.gain == pytest.approx(other.gain, abs=1e-5)
            experts.add(one.expert)
    assert len(experts) > 1
