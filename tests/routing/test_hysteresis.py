"""The rules at a chunk boundary, one by one, with numbers that can be checked by hand."""

import torch

from bem.routing.action import EXPERT, FADE, FLIPS, PLAN, RECORD, SPAN_LEFT, TURN, ActionSpace
from bem.routing.hysteresis import Boundary, Limits, allowed, execute, fade_of

SPACE = ActionSpace(("a", "b"), (1, 2, 4), (2, 4), (0.5, 1.0, 1.5))
LIMITS = Limits(switch_cost=0.1, hysteresis=0.1, plan_length=3, flip_rate_max=0.2, flip_burst=1)
ALL = torch.ones(3, dtype=torch.bool)


def boundary(number=5, turn=False, q=(0.0, 0.0, 0.0), **columns) -> Boundary:
    record = torch.zeros(1, RECORD)
    for name, value in columns.items():
        record[0, globals()[name]] = value
    return Boundary(record, torch.tensor([number]), torch.tensor([turn]), torch.tensor([q]))


def experts(at: Boundary, available=ALL) -> list[bool]:
    return allowed(at, SPACE, LIMITS, available).masks[0][0].tolist()


def act(at: Boundary, *action: int, hold=False, fade=0.0) -> torch.Tensor:
    found = execute(at, torch.tensor([action]), torch.tensor([hold]), torch.tensor([fade]), SPACE)
    return found[0]


def test_an_expert_is_left_only_for_a_gain_above_switch_cost_plus_hysteresis():
    assert experts(boundary(EXPERT=1, PLAN=1, q=(0.0, 1.0, 1.19))) == [False, True, False]
    assert experts(boundary(EXPERT=1, PLAN=1, q=(0.0, 1.0, 1.21))) == [False, True, True]


def test_the_first_chunk_has_nothing_to_stay_with():
    assert experts(boundary(number=1)) == [True, True, True]


def test_a_span_runs_to_its_end_and_a_turn_ends_it():
    at = boundary(EXPERT=1, SPAN_LEFT=1, PLAN=1, q=(0.0, 0.0, 9.0))
    found = allowed(at, SPACE, LIMITS, ALL)
    assert found.running.item() and all(int(m.sum()) == 1 for m in found.masks)
    turned = boundary(turn=True, EXPERT=1, SPAN_LEFT=1, PLAN=1, q=(0.0, 0.0, 9.0))
    assert experts(turned) == [False, True, True]


def test_a_full_plan_holds_until_the_next_turn():
    full = boundary(EXPERT=1, PLAN=3, q=(0.0, 0.0, 9.0))
    assert allowed(full, SPACE, LIMITS, ALL).full.item() and experts(full) == [False, True, False]
    assert experts(boundary(turn=True, EXPERT=1, PLAN=3, q=(0.0, 0.0, 9.0)))[2]


def test_flips_are_paid_from_a_bucket():
    # burst 1 + 0.2 per chunk: at chunk 5 two changes in all
    assert experts(boundary(number=5, EXPERT=1, FLIPS=1, PLAN=1, q=(0.0, 0.0, 9.0)))[2]
    assert not experts(boundary(number=5, EXPERT=1, FLIPS=2, PLAN=1, q=(0.0, 0.0, 9.0)))[2]


def test_an_unloaded_expert_is_left_at_once_whatever_it_costs():
    gone = torch.tensor([True, False, True])
    at = boundary(EXPERT=1, SPAN_LEFT=3, PLAN=3, FLIPS=99, q=(0.0, 9.0, 0.0))
    assert experts(at, gone) == [True, False, True]


def test_what_was_done_is_recorded():
    record = act(boundary(EXPERT=1, PLAN=1, FLIPS=1), 2, 1, 0, 2)
    assert record.tolist() == [2, 1, 0, 2, 2, 2, 0, 0]  # span of 2: one chunk left
    record = act(boundary(EXPERT=2, SPAN_LEFT=1, PLAN=2, FLIPS=1), 0, 0, 0, 0, hold=True)
    assert record[[EXPERT, SPAN_LEFT, PLAN, FLIPS]].tolist() == [2, 0, 2, 1]
    record = act(boundary(turn=True, EXPERT=2, PLAN=3, TURN=4), 2, 0, 0, 0)
    assert record[[PLAN, TURN]].tolist() == [1, 5]


def test_deciding_the_same_again_is_no_new_action_of_the_plan():
    assert act(boundary(EXPERT=1, PLAN=1), 1, 0, 0, 0)[PLAN] == 1
    assert act(boundary(EXPERT=1, PLAN=1), 1, 0, 1, 0)[PLAN] == 2


def test_a_gate_fades_below_the_confidence_asked_for():
    faded = fade_of(torch.tensor([0.9, 0.5, 0.25, 0.0]), 0.5)
    assert faded.tolist() == [0, 0, 8, 16]
    record = torch.zeros(RECORD)
    record[EXPERT], record[FADE] = 1, 4
    assert SPACE.decision(record, 0).gates.tolist() == [0.75, 0.0]
    assert SPACE.decision(record, 2).gates.tolist() == [0.75, 0.25]


def test_a_shared_expert_acts_beside_the_chosen_one_and_beside_the_base():
    space = ActionSpace(("a", "b"), (1,), (4,), (1.0,), shared=True)
    record = torch.zeros(2, RECORD)
    record[1, EXPERT] = 2
    assert space.decision(record, 0).gates.tolist() == [[0, 0, 1], [0, 1, 1]]
