"""The strength of a request is a factor on its experts, bounded by the trust region, and part of its chunks' names."""

import gc

import pytest
import torch

import bem
from bem.adapters.checks_models import tiny_model
from bem.engine.request import Request
from bem.errors import EngineError
from bem.experts.expert import Update, from_updates
from bem.routing.action import EXPERT, STRENGTH
from tests.engine.plain import plain, prompts
from tests.engine.test_chain import changed_expert
from tests.engine.test_engine import adapted, engine_of, lively
from tests.routing.mounted import FREE, expert

NEW = 24
FACTORS = (0.0, 0.5, 1.0, 2.0)


def loud(factor: float, **overrides):
    """A router over experts whose updates are so many times those of a quiet one; powers of two, so that both
    ways of scaling round alike."""
    model = tiny_model("llama")
    made = []
    for name, rank, seed in (("a", 4, 0), ("b", 4, 1), ("c", 2, 2)):
        quiet = expert(model, name, rank, seed)
        updates = {s: Update(16 * factor * u.u, u.v) for s, u in quiet.updates.items()}
        made.append(from_updates(name, updates, "test"))
    routed = lively(bem.mount(model, made, **{**FREE, **overrides}))
    routed.router.trained = True
    routed.router.available[0] = False  # it would choose the bare base throughout
    return routed


def asked(ids, factor: float, **fields) -> Request:
    return Request(ids, max_new_tokens=NEW, ignore_eos=True, strength=factor, **fields)


@pytest.mark.parametrize("route", [None, "a"])
def test_answers_are_those_of_experts_that_are_so_many_times_as_strong(tokenizer, route):
    texts = prompts(30, 41)
    option = None if route is None else 1
    wanted = {f: [plain(loud(f), ids, NEW, route=option) for ids in texts] for f in FACTORS}
    assert len({tuple(answers[0]) for answers in wanted.values()}) == len(FACTORS)
    engine = engine_of(loud(1.0), tokenizer, slots=6)
    requests = [asked(ids, f, route=route) for ids in texts for f in FACTORS]
    given = engine.generate(requests)  # side by side
    assert [list(r.token_ids) for r in given] == [wanted[f][i] for i in (0, 1) for f in FACTORS]
    again = engine.generate(requests)  # out of the store
    assert [r.token_ids for r in again] == [r.token_ids for r in given]
    assert [r.cached_tokens for r in again] == [29] * 4 + [40] * 4
    acted = [{a.strength for a in r.actions if a.expert != "base"} for r in given]
    assert acted[0] == {0.0} and max(acted[3]) <= 3.0
    if route is not None:
        assert acted == [{f} for f in FACTORS] * 2


def test_a_release_with_another_expert_is_composed_anew_at_the_same_strength(tokenizer):
    live = loud(1.0)
    other = changed_expert(live, "a")
    (ids,) = prompts(60)
    engine = engine_of(live, tokenizer)
    engine.generate([asked(ids, 2.0)])
    live.adopt(other)
    warm = engine.generate([asked(ids, 2.0)])[0]
    cold = engine_of(live, tokenizer, cache_gib=0).generate([asked(ids, 2.0)])[0]
    assert warm.token_ids == cold.token_ids


def test_the_trust_region_holds_at_any_strength():
    routed = loud(1.0, trust_radius=0.05)
    pack = routed.pack.at_strength(4.0)
    assert pack.expert_digests == routed.pack.expert_digests
    records = pack.controller.rules.all_records(torch.device("cpu"))
    control = pack.controller.composer(pack.members, records, pack.controller.rules)
    norms = []
    for member, c in zip(pack.members, control.split(pack._widths, -1), strict=True):
        update = torch.einsum("or,nr,ri->noi", member.u.double(), c, member.v.double())
        norms.append(torch.linalg.matrix_norm(update))
    on = records[:, EXPERT] > 0
    assert max(n.max() for n in norms) <= 0.05 * (1 + 1e-6)
    assert min(n[on & (records[:, STRENGTH] == 2)].max() for n in norms) > 0.0499


def test_rows_of_one_strength_share_what_acts_as_long_as_anybody_needs_it(tokenizer):
    engine = engine_of(loud(1.0), tokenizer)
    (ids,) = prompts(12)
    for number in range(2):
        engine.submit(asked(ids, 0.5, route="ab"[number]))
    engine.step()
    first, second = engine.running
    assert first.acts is second.acts and first.acts.acting.members is engine.adapted.pack.members
    del first, second
    while engine.busy:
        engine.step()
    engine.generate([asked(ids, 1.0)])
    gc.collect()
    assert not engine._versions.current._strengths


@pytest.mark.parametrize("variant", ["s0", "v1"])
def test_what_has_no_experts_has_no_strength(variant, tokenizer):
    engine = engine_of(adapted(variant), tokenizer)
    with pytest.raises(EngineError, match=r"strength 0\.5 scales what a router's experts do"):
        engine.submit(asked([3, 4], 0.5))
    assert engine.generate([asked([3, 4], 1.0)])[0].token_ids


@pytest.mark.parametrize("strength", [-0.5, float("nan"), float("inf")])
def test_a_strength_that_makes_no_sense_is_refused(strength):
    with pytest.raises(EngineError, match="strength must be at least 0 and finite"):
        asked([3], strength)
