"""What was decided is looked up or composed: the same controls either way."""

import copy
import pickle
import weakref

import pytest
import torch

from bem.experts.compose import TrustRegion
from bem.routing import composer as module
from bem.routing.action import EXPERT, FADE, FADE_STEPS, RANK, RECORD, STRENGTH, ActionSpace
from bem.routing.composer import TABLES_KEPT, Composer, Rules, Table
from tests.conftest import make_llama
from tests.routing.mounted import mounted

FLOAT = torch.float32


def records(*actions):
    made = torch.zeros(1, len(actions), RECORD)
    for i, action in enumerate(actions):
        for column, value in zip((EXPERT, RANK, STRENGTH, FADE), action, strict=False):
            made[0, i, column] = value
    return made


def packed(model):
    return [stack.at(FLOAT) for stack in model.stacks.values()]


@pytest.mark.parametrize("region", [None, TrustRegion(0.3), TrustRegion(0.3, "spectral")])
@pytest.mark.parametrize("tabled", [True, False])
def test_controls_are_those_that_each_site_composes(monkeypatch, tabled, region):
    monkeypatch.setattr(module, "SMALL", 1 << 20 if tabled else 0)
    model = mounted(make_llama(), confidence=0.5, fallback="c")
    rules = Rules(model.router.space, model.router.limits, 8, 0.5, 3, region)
    members = packed(model)
    weights = sum(p.numel() for s in model.stacks.values() for p in s.parameters())
    assert rules.tabled(sum(m.control_width for m in members), weights if tabled else 0) == tabled
    decided = records((1, 1, 1), (2, 0, 2), (1, 1, 1, 7), (3, 2, 0, FADE_STEPS), (0, 2, 1))
    controls = Composer()(members, decided, rules)
    decision = rules.space.decision(decided, 3)
    expected = torch.cat([m.compose(decision, region) for m in members], -1)
    assert controls.dtype == torch.float64
    assert torch.equal(controls, expected)


def test_every_decision_has_a_row_of_its_own():
    space = ActionSpace(("a", "b"), (1, 2), (1, 4), (0.5, 1.0, 2.0))
    for confidence, fades in ((0.0, 1), (0.4, FADE_STEPS + 1)):
        rules = Rules(space, None, confidence=confidence)
        assert rules.actions == 3 * 2 * 3 * fades
        rows = rules.index(rules.all_records(torch.device("cpu")))
        assert rows.tolist() == list(range(rules.actions))


def test_all_actions_are_composed_once_for_each_set_of_weights(monkeypatch):
    model = mounted(make_llama(), trust_radius=0.05)
    rules, composer, calls = model.router.rules, Composer(), []
    real = module._composed
    monkeypatch.setattr(module, "_composed", lambda *args: calls.append(1) or real(*args))
    decided = records((1, 1, 1), (2, 0, 2))
    first = composer(packed(model), decided, rules)
    once = len(calls)
    first.zero_()  # what is returned is the caller's
    again = composer(packed(model), decided, rules)
    assert len(calls) == once and again.abs().max() > 0
    old = packed(model)
    with torch.no_grad():
        next(iter(model.stacks.values())).u["0"].mul_(2.0)
    assert not torch.equal(composer(packed(model), decided, rules), again)
    assert len(calls) == 2 * once
    assert torch.equal(composer(old, decided, rules), again)  # a sequence that began before
    assert len(calls) == 2 * once
    for number in range(2 * TABLES_KEPT):
        other = Rules(rules.space, rules.limits, region=TrustRegion(1.0 + number))
        composer(packed(model), decided, other)
        assert len(composer._tables) <= TABLES_KEPT


def test_weights_that_train_are_composed_as_they_are():
    model, decided = mounted(make_llama()), records((1, 2, 1))
    with model.training("experts"):
        composer = Composer()
        before = composer(
            packed(model), decided, Rules(model.router.space, None, region=TrustRegion(0.1))
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0)
        after = composer(
            packed(model), decided, Rules(model.router.space, None, region=TrustRegion(0.1))
        )
    assert after.abs().max() < before.abs().max() and not composer._tables


def test_as_many_experts_are_on_at_once_as_the_rules_say():
    model = mounted(make_llama(), confidence=0.5, fallback="a")
    assert model.router.rules.most == 2  # the chosen one, and the one it fades to
    assert mounted(make_llama(), confidence=0.5).router.rules.most == 1  # it fades to the base
    assert mounted(make_llama(), shared="c").router.rules.most == 2
    for stack in model.stacks.values():
        assert stack.mounting.most == 2


@pytest.mark.parametrize("region", [None, TrustRegion(0.3)])
def test_a_table_holds_a_byte_for_each_rank_and_says_what_composing_says_of_every_action(region):
    model = mounted(make_llama(), confidence=0.5, fallback="c", strengths=(0.5, 1.0))
    rules = Rules(model.router.space, model.router.limits, 8, 0.5, 3, region)
    members, width = packed(model), sum(s.control_width for s in model.stacks.values())
    table, every = Table(members, rules), rules.all_records(torch.device("cpu"))
    expected = module._composed(members, every, rules).float()
    assert torch.equal(table(rules.index(every)), expected)
    strengths = len(rules.space.strengths)
    assert strengths > 1 and table.codes.dtype == torch.uint8
    assert table.codes.shape == (rules.actions // strengths, width)
    assert table.values.shape == (rules.actions, 1 + 2 * len(members))  # two experts at most


def test_codes_are_as_narrow_as_the_sites_allow(monkeypatch):
    model = mounted(make_llama())
    rules = model.router.rules
    members = packed(model) * 100
    table = Table(members, rules)
    assert table.codes.dtype == torch.int16
    every = rules.all_records(torch.device("cpu"))
    assert torch.equal(table(rules.index(every)), module._composed(members, every, rules).float())


def test_a_table_does_not_keep_the_weights_that_it_was_made_for():
    model, composer, decided = mounted(make_llama()), Composer(), records((1, 1, 1))
    rules = model.router.rules
    composer(packed(model), decided, rules)
    old = weakref.ref(packed(model)[0])
    for stack in model.stacks.values():
        stack.clear(0)
    assert model.pack is not None and old() is None
    composer(packed(model), decided, rules)
    assert len(composer._tables) == 1


def test_a_copy_of_a_composer_makes_tables_of_its_own():
    model, composer = mounted(make_llama()), Composer()
    first = composer(packed(model), records((1, 1, 1)), model.router.rules)
    for other in (copy.deepcopy(composer), pickle.loads(pickle.dumps(composer))):
        assert not other._tables
        assert torch.equal(other(packed(model), records((1, 1, 1)), model.router.rules), first)
