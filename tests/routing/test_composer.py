"""What was composed once is remembered, as long as nothing that it rests on changes."""

import torch

from bem.experts.compose import TrustRegion
from bem.routing.action import EXPERT, RANK, RECORD, STRENGTH, ActionSpace
from bem.routing.composer import REMEMBERED, Composer
from tests.conftest import make_llama
from tests.routing.mounted import mounted


def records(*actions):
    found = torch.zeros(1, len(actions), RECORD)
    for i, (expert, rank, strength) in enumerate(actions):
        found[0, i, EXPERT], found[0, i, RANK], found[0, i, STRENGTH] = expert, rank, strength
    return found


def test_controls_are_those_of_the_sites_and_are_composed_once():
    model = mounted(make_llama())
    members, space = list(model.stacks.values()), model.router.space
    composer, calls = Composer(), []
    real = members[0].compose
    members[0].compose = lambda *args: calls.append(1) or real(*args)
    decided = records((1, 1, 1), (2, 0, 2), (1, 1, 1))
    found = composer(members, decided, space, 0, None)
    decision = space.decision(decided, 0)
    assert torch.equal(found, torch.cat([m.compose(decision, None) for m in members], -1))
    kept, calls[:] = found.clone(), []
    found.zero_()  # what is returned is the caller's
    assert torch.equal(composer(members, decided, space, 0, None), kept) and not calls
    composer(members, decided[:, :1], space, 0, TrustRegion(0.5))  # another region
    assert len(calls) == 1
    with torch.no_grad():
        members[0].u.mul_(2.0)  # other weights
    composer(members, decided[:, :1], space, 0, TrustRegion(0.5))
    assert len(calls) == 2


def test_no_more_actions_are_remembered_than_fit():
    model = mounted(make_llama())
    members = list(model.stacks.values())
    strengths = tuple(1 + i / 1000 for i in range(2 * REMEMBERED))
    space = ActionSpace(model.router.space.experts, (1,), (4,), strengths)
    composer = Composer()
    for start in range(0, len(strengths), 32):
        composer(members, records(*((1, 0, s) for s in range(start, start + 32))), space, 0, None)
        assert len(composer._known) <= REMEMBERED + 32
