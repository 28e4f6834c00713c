"""What acts on a sequence, and how it is named."""

import pytest
import torch

from bem.engine.acts import acts_of
from bem.errors import EngineError
from tests.engine.test_chain import changed_expert
from tests.engine.test_engine import adapted


def test_an_expert_is_named_or_numbered_and_an_unknown_one_lists_the_others():
    acts = acts_of(adapted("router"))
    assert [acts.option(r) for r in (None, "base", "c", 0, 2)] == [None, 0, 3, 0, 2]
    for unknown in ("d", 4, -1):
        with pytest.raises(EngineError, match="from option 0 on: base, a, b, c"):
            acts.option(unknown)


def test_decisions_have_one_name_under_releases_that_differ_in_an_experts_weights_alone():
    subject = adapted("router")
    acts, release = acts_of(subject), acts_of(changed_expert(subject, "a"))
    assert acts.controller == release.controller and acts.version != release.version
    subject.unload("b")  # what can be chosen is part of a decision
    assert acts_of(subject).controller != acts.controller
    static = acts_of(adapted("v1"))
    assert static.controller == static.version.digest and not static.frozen and acts.frozen


def test_a_decision_composed_again_is_what_was_applied():
    subject = adapted("router")
    ids, route = torch.arange(3, 43)[None], torch.tensor([0, 1, 2, 3, 3]).repeat_interleave(8)[None]
    with torch.no_grad():
        out = subject.model(input_ids=ids, route=route, use_cache=True)
    layer = out.past_key_values.layers[-1]
    applied, tails = layer.applied()[1][0, 1:], layer.memory()[1][0, 1:]
    acts = acts_of(subject)
    for control, tail in zip(applied, tails, strict=True):
        again = acts.compose_again(tail[None])
        assert again is not None and torch.equal(again[0], control)
    digests = [(), *((e.digest,) for e in subject.experts), (subject.experts[2].digest,)]
    assert [acts.weights(control)[1] for control in applied] == digests
    given = acts.actions(tails, [0, 8, 16, 24, 32])
    assert [a.expert for a in given] == ["base", "a", "b", "c", "c"]
    assert [(a.start, a.rank, a.strength) for a in given][:2] == [(0, 0, 0.0), (8, 4, 1.0)]
    assert acts_of(adapted("v1")).compose_again(tails[:1]) is None
