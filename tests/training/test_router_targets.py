"""Who should answer a turn, by labels and by losses; which rows are held out."""

import numpy as np
import pytest
import torch

from bem.errors import DataError
from bem.training.example import Example
from bem.training.router_targets import (
    UNKNOWN,
    as_traces,
    check_enough,
    folds_of,
    per_turn,
    prompts_of,
    split_rows,
    targets_of,
)
from bem.training.routing_rows import RoutingExample
from tests.conftest import make_tokenizer

TALK = (("first", "yes"),)


def targets(examples, losses, chunk_size=8):
    prompts = prompts_of(examples, make_tokenizer(), 400)
    return targets_of(examples, prompts, losses, ("a", "b"), 0, chunk_size)


def test_a_prompt_ends_with_the_start_of_the_turn_to_come():
    (prompt,) = prompts_of(
        [RoutingExample(Example("e", "hi", (), history=TALK))], make_tokenizer(), 400
    )
    assert prompt.turn_starts[-1] and sum(prompt.turn_starts) == 2


def test_the_label_decides_and_says_nothing_of_other_turns():
    row = Example("e", "hi", (), history=TALK)
    found = targets([RoutingExample(row, (None, "b"))], [None])
    assert found.best.tolist() == [[UNKNOWN, 2]]
    assert found.wanted[0].tolist() == [[0, 0, 0], [0, 0, 1]]
    assert found.regrets()[0, 1].tolist() == [1, 1, 0]


def test_the_least_loss_decides_and_one_that_is_nearly_as_good_is_nearly_as_wanted():
    losses = np.array([[1.0, 0.5, 0.6]], np.float32)
    found = targets([RoutingExample(Example("e", "hi", ("x",)))], [losses])
    assert found.best.tolist() == [[1]]
    assert found.wanted[0, 0, 1] / found.wanted[0, 0, 2] == pytest.approx(np.e, rel=1e-4)
    assert found.regrets()[0, 0].tolist() == pytest.approx([0.5, 0.0, 0.1])


def test_of_a_row_with_both_the_label_decides_and_the_losses_stay_known():
    losses = np.array([[0.1, 0.5, 3.6]], np.float32)
    found = targets([RoutingExample(Example("e", "hi", ("x",)), ("b",))], [losses])
    assert found.best.tolist() == [[2]] and found.regrets()[0, 0].tolist() == [1, 1, 0]
    assert found.losses[0, 0].tolist() == losses[0].tolist()


def test_rows_of_fewer_turns_are_padded():
    rows = [Example("e", "hi", (), history=TALK), Example("f", "hi", ())]
    found = targets(
        [RoutingExample(r, (*[None] * len(r.history), "a")) for r in rows], [None, None]
    )
    assert found.best.tolist() == [[UNKNOWN, 1], [1, UNKNOWN]]
    assert found.starts[1, 1] == 0 and (found.starts[:, 0] > 1).all()


def test_losses_of_chunks_are_summed_over_the_turn_that_they_answer():
    losses = np.array([[0.0], [0.25], [0.5], [4.0]], np.float32)
    turns = np.array([False, True, False, True])
    assert per_turn(losses, turns).tolist() == [[0.75], [4.0]]


def test_as_traces_a_turn_is_answered_where_it_begins():
    row = Example("e", "hi", (), history=TALK)
    found = targets([RoutingExample(row, ("a", "b"))], [None])
    traces = as_traces(found)
    at = found.starts[0] - 1
    assert traces.answers[0].nonzero()[0].tolist() == at.tolist()
    assert traces.path[0, at].tolist() == [1, 2]
    assert traces.experts[0, at].tolist() == [[1, 0, 1], [1, 1, 0]]
    assert traces.chunks[0] == at[-1] + 1


def rows(n):
    return [RoutingExample(Example(f"r{i}", f"text {i}", ())) for i in range(n)]


def test_the_held_out_share_is_taken_of_every_option_and_by_the_seed():
    best = [0] * 40 + [1] * 8
    out = split_rows(rows(48), best, 0.25, seed=3)
    assert out[:40].sum() == 10 and out[40:].sum() == 2
    assert (out == split_rows(rows(48), best, 0.25, seed=3)).all()
    assert (out != split_rows(rows(48), best, 0.25, seed=4)).any()


def test_a_document_and_equal_texts_are_on_one_side():
    own = [Example(f"a{i}", f"text {i}", (), group=f"doc{i // 4}") for i in range(40)]
    same = [Example(f"b{i}", f"say {i // 2}", ()) for i in range(40)]
    out = split_rows([RoutingExample(r) for r in (*own, *same)], [0] * 40 + [1] * 40, 0.3, 0)
    assert all(len(set(out[i : i + 4])) == 1 for i in range(0, 40, 4))
    assert all(len(set(out[i : i + 2])) == 1 for i in range(40, 80, 2))
    assert 0 < out[:40].sum() < 40 and 0 < out[40:].sum() < 40


def test_the_only_document_of_an_expert_teaches_and_one_of_each_is_an_error():
    same = [RoutingExample(Example(f"s{i}", "again", ())) for i in range(8)]
    out = split_rows([*same, *rows(8)], [0] * 8 + [1] * 8, 0.25, 0)
    assert not out[:8].any() and out[8:].sum() == 2
    with pytest.raises(DataError, match="nothing can be held out: the 8 rows are 1 documents"):
        split_rows(same, [0] * 8, 0.25, 0)


def test_folds_hold_every_option_and_whole_rows():
    turn_rows, best = [0, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 0, 0, 0, 1, 1, 1, 1]
    folds = folds_of(turn_rows, best, 4, seed=0)
    assert folds[0] == folds[1] and set(folds.tolist()) == {0, 1, 2, 3}
    first = torch.tensor([best[turn_rows.index(r)] for r in range(8)])
    of_row = torch.tensor([folds[turn_rows.index(r)] for r in range(8)])
    assert all(sorted(of_row[first == o].tolist()) == [0, 1, 2, 3] for o in (0, 1))
    assert int(folds_of([0, 1, 2, 3, 4], [0, 0, 0, 1, 1], 5, 0).max()) == 1  # two rows: two folds


def test_too_few_rows_are_named_with_their_number():
    names = ("base", "sql", "chat")
    check_enough([1] * 8 + [2] * 9, [1, 2], names, 8)
    check_enough([1] * 9 + [2] * 3, [1], names, 8)  # what the oracle alone finds may be rare
    with pytest.raises(
        DataError, match=r"'chat' is right for 3 rows, fewer than 8\. Rows: sql 9, chat 3"
    ):
        check_enough([1] * 9 + [2] * 3, [1, 2], names, 8)
    with pytest.raises(DataError, match=r"all rows go to one expert \(sql 9\)"):
        check_enough([1] * 9, [1], names, 8)
