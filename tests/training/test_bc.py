"""Cloning learns a route that can be read off the text, and says how well on conversations it never saw."""

import numpy as np
import pytest
import torch

from bem.config import CloningConfig, ReadingConfig, parse
from bem.errors import ConfigError, TrainingError
from bem.routing.explain import explain
from bem.routing.oracle import best_path
from bem.training.bc import clone, split_of
from bem.training.data import Example, encode
from bem.training.traces import trace
from tests.conftest import make_llama, make_tokenizer
from tests.routing.mounted import mounted

CONFIG = CloningConfig(epochs=60, learning_rate=1e-2, switch_cost=0.0, rounds=1)


def rows():
    """Prompts of two kinds; the kind says which expert is to answer."""
    words = ("name the function. " * 4, "return the value. " * 4)
    for n in range(40):
        kind = n % 2
        prompt = words[kind] + "abcdefghij"[n // 4]
        yield kind, encode(Example(str(n), prompt, ("that",)), make_tokenizer(), 256)


def planted(model, encoded, kinds):
    """Traces whose losses say: expert 1 for the first kind, expert 2 for the second."""
    traces = trace(model, encoded, 0, CONFIG)
    experts = np.full_like(traces.experts, 1.0) * traces.answers[..., None]
    for row, kind in enumerate(kinds):
        experts[row, :, 1 + kind] = 0.0
    real = np.arange(traces.path.shape[1]) < traces.chunks[:, None]
    oracle = best_path(experts, 0.0, real=real)
    changes = {"path": oracle.path, "cost_to_go": oracle.cost_to_go.astype(np.float32)}
    return type(traces)(**{**vars(traces), "experts": experts, **changes})


def cloned(seed: int = 0):
    torch.manual_seed(seed)
    kinds, encoded = zip(*rows(), strict=True)
    model = mounted(make_llama(), router_layer=0)
    traces = planted(model, encoded, kinds)
    return model, encoded, kinds, clone(model, encoded, traces, 0, CONFIG, seed=3)


def test_the_planted_route_is_learned_far_above_chance():
    model, encoded, kinds, result = cloned()
    answers = next(a for a in result.accuracy if a.head == "expert at answers")
    assert answers.accuracy > 0.9 > answers.majority and answers.chance == 0.25
    assert result.held_out > 0 and result.decisions > result.held_out
    for row in (0, 1):
        chunks = explain(model, encoded[row].input_ids, encoded[row].turn_starts)
        assert next(c.expert for c in chunks if c.turn) == "ab"[kinds[row]]


def test_the_same_seed_gives_the_same_policy():
    one, two = (cloned()[0].router.policy.state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_every_conversation_is_on_one_side_and_the_shares_are_those_of_the_config():
    settings = CloningConfig(validation=0.1, held_out=0.25)
    split = split_of(40, settings, seed=0)
    sides = torch.stack([split.train, split.validation, split.held_out])
    assert (sides.sum(0) == 1).all() and sides.sum(1).tolist() == [26, 4, 10]
    assert not torch.equal(split.held_out, split_of(40, settings, seed=1).held_out)
    with pytest.raises(TrainingError, match="2 conversations are too few"):
        split_of(2, settings, 0)
    with pytest.raises(ConfigError, match=r"validation 0\.5 and held_out 0\.5"):
        parse(CloningConfig, {"validation": 0.5, "held_out": 0.5}, "test")


def test_accuracy_is_stated_on_conversations_that_chose_nothing():
    """Held-out traces are made nonsense: no weight may notice, only the stated numbers do."""
    kinds, encoded = zip(*rows(), strict=True)
    settings = CONFIG.model_copy(
        update={"epochs": 3, "reading": ReadingConfig(tries=2, epochs=3), "rounds": 0}
    )
    held_out = split_of(len(encoded), settings, seed=3).held_out.numpy()
    results = []
    for spoilt in (False, True):
        torch.manual_seed(0)
        model = mounted(make_llama(), router_layer=0)
        traces = planted(
            model, encoded, [k ^ (spoilt and o) for k, o in zip(kinds, held_out, strict=True)]
        )
        made = clone(model, encoded, traces, 0, settings, seed=3)
        results.append((model.router.policy.state_dict(), made))
    (one, good), (two, bad) = results
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert good.curve == bad.curve and good.reading == bad.reading
    assert good.accuracy != bad.accuracy


def test_only_the_router_learns():
    model = mounted(make_llama())
    before = {n: p.clone() for n, p in model.base.named_parameters() if "policy" not in n}
    encoded = [e for _, e in rows()]
    clone(
        model,
        encoded,
        trace(model, encoded, 0, CONFIG),
        0,
        CONFIG.model_copy(update={"epochs": 2}),
        0,
    )
    after = dict(model.base.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert not any(p.requires_grad for p in model.parameters())
