"""What the router saw is paired with what the oracle does there."""

import numpy as np
import pytest
import torch

from bem.config import CloningConfig
from bem.training.data import Example, encode
from bem.training.decisions import DecisionReader, Decisions
from bem.training.traces import target_actions, trace
from tests.conftest import make_llama, make_tokenizer
from tests.routing.mounted import mounted

CONFIG = CloningConfig(switch_cost=0.0)


@pytest.fixture(scope="module")
def reader():
    model = mounted(make_llama(), spans=(1, 2))
    rows = [
        encode(Example(str(n), "name the function. " * n, ("that",)), make_tokenizer(), 256)
        for n in (1, 3, 5)
    ]
    traces = trace(model, rows, 0, CONFIG)
    traces.path[:] = np.arange(traces.path.shape[1]) // 2 % 3 + 1  # a, a, b, b, c, c, a ...
    return DecisionReader(model, rows, traces, 0, CONFIG, batch_size=2)


def test_on_the_oracles_path_the_targets_are_the_oracles_actions(reader):
    decisions, traces = reader.oracle(), reader.traces
    actions = target_actions(traces, reader.space, CONFIG.rank_cost, CONFIG.margin)
    for row in range(3):
        chunk = 0
        of_row = decisions.of(torch.arange(3) == row)
        for target, q in zip(of_row.targets, of_row.q, strict=True):
            assert target.tolist()[1:] == actions[row, chunk].tolist()[1:]
            assert q.tolist() == pytest.approx((-traces.cost_to_go[row, chunk]).tolist())
            end = chunk + reader.space.spans[actions[row, chunk, 1]]
            chunk += 1
            while chunk < min(end, traces.chunks[row]) and not traces.turns[row, chunk]:
                chunk += 1
        assert chunk == traces.chunks[row]  # every chunk is in exactly one span


def test_what_was_seen_is_what_the_policy_is_given_in_a_whole_forward_pass(reader):
    decisions, model = reader.own(), reader.mounted
    seen = []
    for row in reader.rows:
        ids, turns = torch.tensor([row.input_ids]), torch.tensor([row.turn_starts])
        with torch.no_grad(), model.router.watched() as tape:
            model.model(ids, turn_starts=turns, use_cache=False)
        real = [step for step in tape if bool(step.real[0])]
        seen.append([s.observation[0] for s in real if not bool(s.allowed.hold[0])])
    for row, observations in enumerate(seen):
        found = decisions.of(torch.arange(3) == row).observations
        torch.testing.assert_close(found, torch.stack(observations), atol=1e-5, rtol=1e-4)


def test_who_is_off_the_oracles_path_is_told_the_way_back_and_nothing_else(reader):
    own = reader.own()
    off = own.weights[:, 1:].sum(1) == 0
    assert (own.weights[:, 0] == 1).all()
    assert ((own.weights[:, 1:] == 1).all(1) | off).all()


def test_decisions_are_joined_and_selected_row_by_row(reader):
    decisions = reader.oracle()
    both = Decisions.join([decisions, decisions])
    assert len(both) == 2 * len(decisions)
    half = both.select(torch.arange(len(decisions)))
    assert torch.equal(half.observations, decisions.observations)
    assert set(both.of(torch.tensor([True, False, True])).conversation.tolist()) == {0, 2}
