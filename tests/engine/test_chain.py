"""What is reused is what would have been computed, and as much of it as can be."""

import gc
from dataclasses import replace

import pytest
import torch

import bem.engine.versions as module
from bem.engine.engine import Engine
from bem.engine.request import Request
from tests.engine.plain import plain, prompts
from tests.engine.test_engine import EVIDENCE, adapted, engine_of

NEW = 20


def asked(ids, **fields) -> Request:
    return Request(ids, **{"max_new_tokens": NEW, "ignore_eos": True, **fields})


def changed_expert(mounted, name: str):
    """A shadow in which one expert has other weights."""
    shadow = mounted.shadow()
    number = [e.name for e in shadow.experts].index(name)
    with shadow.training("experts"), torch.no_grad():
        for stack in shadow.stacks.values():
            u, _ = stack.factors(number)
            u += 0.5 * torch.randn(u.shape, generator=torch.Generator().manual_seed(5))
    return shadow


@pytest.mark.parametrize("variant", ["s0", "v1", "router"])
def test_all_finished_chunks_of_a_prompt_are_reused_but_never_its_last_token(variant, tokenizer):
    subject = adapted(variant)
    engine = engine_of(subject, tokenizer, prefill_tokens=200)
    (ids,) = prompts(100)  # chunks of 8, or of 64
    first, second = (engine.generate([asked(ids, max_new_tokens=4)])[0] for _ in range(2))
    finished = 99  # a turn starts at the last token: it ends a chunk
    assert first.cached_tokens == 0 and second.cached_tokens == finished
    assert first.token_ids == second.token_ids
    stats = engine.store.stats
    assert stats.needed == 2 * len(ids)
    assert stats.reused == stats.reusable == finished
    assert stats.missed == {"new": finished, "open": 2}


@pytest.mark.parametrize("variant", ["v4", "router"])
def test_a_conversation_goes_on_behind_its_own_generated_chunks(variant, tokenizer):
    subject = adapted(variant)
    engine = engine_of(subject, tokenizer, prefill_tokens=200)
    ids, turns = prompts(21)[0], []
    for turn in range(4):
        (result,) = engine.generate([asked(ids, turn_starts=tuple(turns))])
        assert list(result.token_ids) == plain(subject, ids, NEW, turns)
        if turn:
            held = len(ids) - 6  # all but what was said since, and the answer's last token
            assert held - result.cached_tokens <= 8  # a chunk that was not finished
        turns.append(len(ids) - 1)
        ids = [*ids, *result.token_ids, *prompts(5, seed=turn)[0]]
    assert engine.store.stats.reused == engine.store.stats.reusable > 100


def test_requests_with_one_prefix_that_come_at_once_read_it_once(tokenizer):
    subject = adapted("v1")
    engine = engine_of(subject, tokenizer, slots=4, prefill_tokens=24)
    (shared,) = prompts(40)
    asks = [[*shared, *own] for own in prompts(3, 5, 4, 9, seed=3)]
    given = engine.generate([asked(ids) for ids in asks])
    assert [list(r.token_ids) for r in given] == [plain(subject, ids, NEW) for ids in asks]
    assert [r.cached_tokens for r in given] == [0, 40, 40, 40]


def test_evidence_route_tenant_and_turns_keep_apart_what_differs(tokenizer):
    (ids,) = prompts(40)
    engine = engine_of(adapted("v2"), tokenizer, prefill_tokens=99)
    others = [{"evidence": EVIDENCE}, {"turn_starts": (12,)}, {"tenant": "b"}]
    engine.generate([asked(ids)])
    for fields in others:
        first, second = (engine.generate([asked(ids, **fields)])[0] for _ in range(2))
        # the text up to a turn that is marked later is the same chunk
        assert first.cached_tokens == (8 if "turn_starts" in fields else 0)
        assert second.cached_tokens == 39 and second.token_ids == first.token_ids
    subject = adapted("router")
    engine = engine_of(subject, tokenizer, prefill_tokens=99)
    for option, route in enumerate(["base", "a", "b", "c"]):
        for cached in (0, 39):
            (result,) = engine.generate([asked(ids, route=route)])
            assert list(result.token_ids) == plain(subject, ids, NEW, route=option)
            assert result.cached_tokens == cached and {a.expert for a in result.actions} == {route}


def test_tokens_are_the_same_while_chunks_are_thrown_out(tokenizer):
    subject = adapted("router")
    asks = prompts(40, 33, 50, 41, 27)
    wanted = [plain(subject, ids, NEW) for ids in asks]
    engine = engine_of(subject, tokenizer)
    engine.store.budget = 60_000  # some ten chunks
    for _ in range(3):
        given = engine.generate([asked(ids) for ids in asks])
        assert [list(r.token_ids) for r in given] == wanted
    stats = engine.store.stats
    assert stats.evicted and stats.missed["evicted"] and stats.nbytes <= 60_000
    assert stats.needed == stats.reused + sum(stats.missed.values())
    assert not any(block.users for block in engine.store.blocks.values())


def test_a_swap_in_the_middle_leaves_running_sequences_and_going_back_is_warm(tokenizer):
    subject = adapted("router")
    before, release = subject.shadow(), changed_expert(subject, "a")
    asks = prompts(40, 33, 50, 41)
    old = [plain(subject, ids, NEW) for ids in asks]
    engine = engine_of(subject, tokenizer, slots=8)
    numbers = [engine.submit(asked(ids)) for ids in asks]
    results = {r.id: r for _ in range(4) for r in engine.step().finished}
    subject.adopt(release)
    new = [plain(subject, ids, NEW) for ids in asks]
    assert new != old
    numbers += [engine.submit(asked(ids)) for ids in asks]  # now both versions run in one batch
    while engine.busy:
        results |= {r.id: r for r in engine.step().finished}
    assert [list(results[n].token_ids) for n in numbers] == old + new
    assert len({results[n].version for n in numbers}) == 2
    subject.adopt(before)
    given = engine.generate([asked(ids) for ids in asks])
    assert [list(r.token_ids) for r in given] == old
    assert [r.cached_tokens for r in given] == [len(ids) - 1 for ids in asks]


def test_a_release_that_changes_one_expert_keeps_every_chunk_before_that_expert_acts(tokenizer):
    subject = adapted("router")
    asks = prompts(*[40] * 16)
    engine = engine_of(subject, tokenizer)
    actions = [r.actions for r in engine.generate([asked(ids, max_new_tokens=1) for ids in asks])]
    subject.adopt(changed_expert(subject, "a"))
    given = engine.generate([asked(ids, max_new_tokens=1) for ids in asks])
    kept = [next((a.start for a in of if a.expert == "a"), 39) for of in actions]
    assert [r.cached_tokens for r in given] == [min(n, 39) for n in kept]
    assert 0 < sum(kept) < 16 * 39  # some are kept, some are not


def test_control_a_key_that_holds_names_alone_serves_wrong_tokens(tokenizer, monkeypatch):
    """What must fail does: with the digests of weights left out of all names, a changed adapter is
    answered from the keys and values of the one before."""
    subject = adapted("v1")
    asks = prompts(40, 33, 50, 41)
    named = module.acts_of(subject)

    def by_name(adapted, acts_of=module.acts_of):
        return replace(acts_of(adapted), version=named.version, controller=named.controller)

    monkeypatch.setattr(module, "acts_of", by_name)
    engine = engine_of(subject, tokenizer)
    engine.generate([asked(ids) for ids in asks])
    changed = {n: t + 0.3 * torch.randn_like(t) for n, t in subject.state_dict().items()}
    subject.load_state_dict(changed)
    right = [plain(subject, ids, NEW) for ids in asks]
    wrong = engine.generate([asked(ids) for ids in asks])
    assert all(list(w.token_ids) != r for w, r in zip(wrong, right, strict=True))
    monkeypatch.undo()
    given = Engine(subject, tokenizer).generate([asked(ids) for ids in asks])
    assert [list(r.token_ids) for r in given] == right


def test_nothing_grows_with_the_number_of_requests(tokenizer):
    engine = engine_of(adapted("router"), tokenizer)
    engine.store.budget = 40_000

    def live() -> tuple[int, int]:
        for seed in range(4):
            engine.generate([asked(ids, max_new_tokens=3) for ids in prompts(20, 9, 31, seed=seed)])
        gc.collect()
        # real ones: a compiler's stand-ins, which other tests leave behind, have no size
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
        return len(tensors), sum(t.nbytes for t in tensors)

    live()
    first, *later = (live() for _ in range(3))
    assert later == [first, first]
