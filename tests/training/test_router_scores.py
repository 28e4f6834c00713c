"""Accuracy, regret and flips of choices, by hand; the router's own path is that of a whole forward pass."""

import numpy as np
import pytest
import torch

from bem.routing.explain import explain
from bem.training.data import Example, encode
from bem.training.router_scores import (
    at_turns,
    path_of,
    regret_as_it_acts,
    router_path,
    score,
)
from bem.training.router_targets import UNKNOWN, Targets, turn_losses
from tests.conftest import make_llama, make_tokenizer
from tests.routing.mounted import mounted

NAMES = ("base", "a", "b")
STARTS = np.array([[2, 0], [2, 4], [3, 0], [2, 0]])
BEST = np.array([[1, -1], [2, 1], [1, -1], [2, -1]])


def made(losses=None):
    wanted = (np.arange(3) == BEST[..., None]).astype(np.float32)
    empty = np.full((4, 2, 3), np.nan, np.float32)
    return Targets(BEST, wanted, empty if losses is None else losses, STARTS)


def test_a_path_changes_where_turns_begin_and_begins_with_the_bare_base():
    choices = np.array([[1, UNKNOWN], [2, 1], [1, UNKNOWN], [2, UNKNOWN]])
    paths = path_of(choices, STARTS)
    assert [p.tolist() for p in paths] == [[0, 1], [0, 2, 2, 1], [0, 0, 1], [0, 2]]
    assert (at_turns(paths, STARTS) == choices).all()


def test_shares_are_of_turns_that_somebody_judged():
    choices = np.array([[1, UNKNOWN], [2, 2], [2, UNKNOWN], [2, UNKNOWN]])
    found = score("x", "layer 0", choices, path_of(choices, STARTS), made(), NAMES)
    assert found.accuracy.value == 3 / 5 and found.of_skill == {"a": 1 / 3, "b": 1.0}
    assert found.flip_rate == 0  # of the two boundaries of row 1; no other row goes on
    choices[1, 1] = 1
    found = score("x", "layer 0", choices, path_of(choices, STARTS), made(), NAMES)
    assert found.flip_rate == 1 / 2
    single = made().select([0, 2])
    found = score("x", "", choices[[0, 2]], path_of(choices[[0, 2]], single.starts), single, NAMES)
    assert found.flip_rate is None
    assert found.regret is None and found.lead is None


def test_regret_is_what_the_choices_lose_beyond_the_best_and_rows_are_the_units():
    losses = np.full((4, 2, 3), np.nan, np.float32)
    losses[0, 0], losses[1, 0], losses[1, 1] = (3, 1, 2), (1, 1, 0.5), (0, 0.25, 1)
    choices = np.array([[2, UNKNOWN], [1, 1], [1, UNKNOWN], [1, UNKNOWN]])
    right = np.where(BEST == UNKNOWN, UNKNOWN, BEST)
    found = score("x", "", choices, path_of(choices, STARTS), made(losses), NAMES, router=right)
    assert found.regret.value == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert found.lead.value == pytest.approx(1 - 2 / 5)  # the router is always right
    of_router = (0 + 0 + 0.25) / 3  # its last choice is not the cheapest
    assert found.regret_lead.value == pytest.approx((1 + 0.5 + 0.25) / 3 - of_router)


def test_one_is_better_only_if_no_interval_says_otherwise():
    n = 40
    best = np.ones((n, 1), np.int64)
    targets = Targets(
        best, np.eye(3, dtype=np.float32)[best], np.full((n, 1, 3), np.nan, np.float32), best + 1
    )
    half = np.where(np.arange(n)[:, None] % 2, 1, 2)
    router = score("plain", "", best, path_of(best, best + 1), targets, NAMES, router=half)
    assert router.is_better and router.lead.value == -0.5
    other = score("plain", "", half, path_of(half, best + 1), targets, NAMES, router=best)
    assert not other.is_better


def test_the_router_s_path_is_that_of_a_forward_pass_alone_without_padding():
    model, tokenizer = mounted(make_llama(), router_layer=1), make_tokenizer()
    rows = [
        encode(Example(str(i), "name the value " * (1 + i), ("return",)), tokenizer, 400)
        for i in range(5)
    ]
    paths = router_path(model, rows, 0, batch_size=2)
    for row, path in zip(rows, paths, strict=True):
        chunks = explain(model, row.input_ids, row.turn_starts)
        assert [model.router.space.name(o) for o in path] == [c.expert for c in chunks]


def test_a_router_that_always_takes_one_expert_acts_as_that_expert_does():
    model, tokenizer = mounted(make_llama(), router_layer=1), make_tokenizer()
    rows = [encode(Example(str(i), f"name {i}", ("return",)), tokenizer, 400) for i in range(6)]
    losses = turn_losses(model, rows, 0, 4, lambda done, of: None)
    policy = model.router.policy
    with torch.no_grad():
        policy.actor.net.out.weight[:] = 0.0
        policy.actor.expert_bias.weight[:] = 0.0
        policy.actor.expert_bias.bias[:] = torch.tensor([0.0, 0.0, 9.0, 0.0])
        policy.actor.net.out.bias[:] = torch.nn.functional.one_hot(
            torch.tensor(model.router.space.sizes[0] + sum(model.router.space.sizes[1:3]) - 1),
            sum(model.router.space.sizes),
        )  # all ranks
        at = sum(model.router.space.sizes[:3]) + model.router.space.plain[2]
        policy.actor.net.out.bias[at] = 1.0  # as trained
    found = regret_as_it_acts(model, rows, losses, 0, 4)
    expected = np.mean([of_turn[0, 2] - of_turn[0].min() for of_turn in losses])
    assert found.value == pytest.approx(expected, abs=1e-5)
