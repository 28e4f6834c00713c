"""Oracle traces equal losses computed one by one, and targets follow from them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bem.config import CloningConfig
from bem.errors import TrainingError
from bem.routing.action import ActionSpace
from bem.training.data import Example, encode
from bem.training.traces import Traces, best_expert, target_actions, trace
from tests.conftest import make_llama, make_tokenizer
from tests.routing.mounted import mounted

SPACE = ActionSpace(("a", "b"), (1, 2, 4), (2, 4), (0.5, 1.0))


def conversation(number: int = 0) -> Example:
    return Example(
        f"row-{number}",
        "name the function " + "that returns the value " * number,
        ("return the value",),
        history=(("this docstring", "describes the function"),),
    )


@pytest.fixture
def cached(tmp_path):
    """A trace on disk, and a call that says whether it is read again for another model or other rows."""
    rows = [encode(conversation(n), make_tokenizer(), 256) for n in range(2)]
    cache = tmp_path / "traces.npz"
    trace(mounted(make_llama()), rows, 0, CloningConfig(), cache=cache)

    def is_read(model=None, rows=rows) -> bool:
        passes: list[int] = []
        model = model or mounted(make_llama())
        show = lambda done, of: passes.append(done)  # noqa: E731
        trace(model, rows, 0, CloningConfig(), cache=cache, on_progress=show)
        return not passes

    return SimpleNamespace(path=cache, rows=rows, is_read=is_read)


def test_a_finished_trace_is_read_again_and_only_for_the_same_rows(cached):
    assert cached.is_read()
    again = trace(mounted(make_llama()), cached.rows, 0, CloningConfig(), cache=cached.path)
    fresh = trace(mounted(make_llama()), cached.rows, 0, CloningConfig())
    assert np.array_equal(again.experts, fresh.experts)
    assert not cached.is_read(rows=cached.rows[:1])


def test_a_trace_belongs_to_its_base(cached):
    assert cached.is_read()
    other = make_llama()
    other.model.norm.weight.data += 1  # same shapes, same experts
    assert not cached.is_read(mounted(other))


def test_a_trace_belongs_to_the_experts_that_were_loaded(cached):
    model = mounted(make_llama())
    model.unload("a")
    assert not cached.is_read(model)


def test_a_trace_belongs_to_what_was_known_of_the_evidence_and_to_the_turns(cached):
    first, second = cached.rows
    assert not cached.is_read(rows=[replace(first, relevance=(1.0,) * 8), second])
    cached.is_read()  # the file is again that of the plain rows
    starts = [True, *first.turn_starts[1:]]
    assert not cached.is_read(rows=[replace(first, turn_starts=starts), second])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_half_a_trace_is_recognised(cached, share):
    content = cached.path.read_bytes()
    cached.path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(TrainingError, match=r"traces\.npz cannot be read .*Delete it"):
        cached.is_read()


def test_no_conversations_are_an_error():
    with pytest.raises(TrainingError, match="no conversations"):
        trace(mounted(make_llama()), [], 0, CloningConfig())


def made(path, turns, answers, chunks) -> Traces:
    rows, length = np.shape(path)
    losses = np.zeros((rows, length, 2), np.float32)
    return Traces(
        np.zeros((rows, length, 3), np.float32),
        losses,
        losses,
        np.array(path),
        np.zeros((rows, length, 3), np.float32),
        np.array(answers, bool),
        np.array(turns, bool),
        np.array(chunks),
    )


def test_spans_end_where_the_path_changes_or_a_turn_begins():
    traces = made([[1, 1, 1, 2, 2, 2, 2]], [[0, 0, 0, 0, 1, 0, 0]], [[0] * 7], [7])
    spans = target_actions(traces, SPACE, 0.0)[0, :, 1]
    # chunks to go on: 3 2 1 | 1 | 3 2 1; spans of 1, 2, 4 chunks
    assert spans.tolist() == [1, 1, 0, 0, 1, 1, 0]


def test_the_smallest_budget_that_is_worth_its_cost_is_the_target():
    traces = made([[1, 1]], [[0, 1]], [[0, 1]], [2])
    traces.ranks[0, 1] = [1.00, 0.98]
    assert target_actions(traces, SPACE, rank_cost=0.0)[0, 1, 2] == 1
    assert target_actions(traces, SPACE, rank_cost=0.1)[0, 1, 2] == 0  # saves .05, loses .02
    assert target_actions(traces, SPACE, 0.1, margin=0.05)[0, 1, 2] == 1  # not clearly


def test_who_went_astray_comes_back_only_if_that_is_worth_the_switch():
    traces = made([[1, 1]], [[0, 1]], [[0, 1]], [2])
    traces.cost_to_go[0, 1] = [5.0, 1.0, 1.05]
    assert best_expert(traces, 0.1, 0, 1, current=2) == 2
    assert best_expert(traces, 0.01, 0, 1, current=2) == 1
    assert best_expert(traces, 0.1, 0, 1, current=0) == 1
