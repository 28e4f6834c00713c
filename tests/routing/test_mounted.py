"""One pointer to what decides and acts: sequences keep what they began with, a shadow trains aside."""

import copy
import threading

import pytest
import torch

import bem
from bem.adapters.copies import shadow as shadow_of
from bem.control.keys import ChunkKey, chunk_keys
from bem.errors import AttachError, CacheError
from bem.routing.action import EXPERT
from tests.conftest import make_llama
from tests.routing.mounted import mounted

IDS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
RANDOM = torch.Generator().manual_seed(4)
ROOT = ChunkKey.root("base", torch.float32, 8, "tokenizer")


def logits(model, ids=IDS, **given):
    with torch.no_grad():
        return model.model(input_ids=ids, use_cache=False, **given).logits


def route(option, ids=IDS):
    return torch.full_like(ids, option)


def answers(model):
    """What the router chooses, and what the first expert says."""
    return torch.cat([logits(model), logits(model, route=route(1))])


def chosen(model):
    with model.router.watched() as tape:
        logits(model)
    return {int(option) for step in tape for option in step.record[:, EXPERT]}


def started(model, tokens, option):
    """A cache of the first tokens under one expert."""
    ids = IDS[:, :tokens]
    with torch.no_grad():
        return model.model(input_ids=ids, route=route(option, ids), use_cache=True).past_key_values


def gone_on(model, cache, start, **given):
    with torch.no_grad():
        return model.model(input_ids=IDS[:, start:], past_key_values=cache, **given).logits


def trained(model, steps=2, what="experts", option=1):
    """A few real steps."""
    with model.training(what):
        if what == "router":
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=RANDOM)
            optimizer.step()
            return model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for _ in range(steps):
            given = {"route": route(option), "labels": IDS, "use_cache": False}
            model.model(input_ids=IDS, **given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


# --- packs -----------------------------------------------------------------------------------------


def test_the_pack_is_the_same_until_something_changes():
    model = mounted(make_llama())
    first = model.pack
    logits(model)
    assert model.pack is first and first.controller is model.router
    assert [m.control_width for m in first.members] == [10] * len(model.stacks)
    with torch.no_grad():
        next(iter(model.stacks.values())).u["0"].mul_(2.0)
    second = model.pack
    assert second is not first and second.expert_digests[1:] == first.expert_digests[1:]
    assert second.expert_digests[0] != first.expert_digests[0] and second.digest != first.digest


def test_digests_are_of_the_weights_that_act_and_the_names_of_experts_that_act_alike_agree():
    model = mounted(make_llama())
    assert model.pack.expert_digests == tuple(e.digest for e in model.experts)
    other = bem.mount(make_llama(), list(reversed(model.experts)), chunk_size=8)
    assert other.pack.expert_digests == tuple(reversed(model.pack.expert_digests))
    applied = torch.zeros(sum(m.control_width for m in model.pack.members))
    nobody = model.acting(applied)
    applied[-1] = 1.0  # the last rank of the last expert at the last site
    alone = bem.mount(make_llama(), model.experts[2:], chunk_size=8)
    assert model.acting(applied) == alone.acting(torch.ones(len(alone.pack.members) * 2)) != nobody


def test_a_pack_in_bfloat16_holds_bfloat16_weights_and_names_them():
    model = mounted(make_llama().to(torch.bfloat16))
    assert {m.dtype for m in model.pack.members} == {torch.bfloat16}
    assert model.pack.digest != mounted(make_llama()).pack.digest
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [20, 24])  # inside a chunk, and at its end
def test_a_running_sequence_goes_on_to_the_bit_when_its_expert_is_unloaded(tokens):
    model = mounted(make_llama())
    running, twin = started(model, tokens, 2), started(model, tokens, 2)
    assert torch.equal(twin.layers[0].keys, running.layers[0].keys)
    expected = gone_on(model, twin, tokens)
    model.unload("b")
    actual = gone_on(model, running, tokens)
    assert torch.equal(actual, expected)
    for layer, other in zip(running.layers[:-1], twin.layers[:-1], strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


def test_a_chunk_that_two_packs_fill_alike_has_one_name_and_others_have_two():
    model = mounted(make_llama())
    before = started(model, 20, 2)
    old = model.pack
    model.unload("b")
    gone_on(model, before, 20, route=route(2, IDS[:, 20:]))  # it began with b
    after = started(model, 20, 2)  # b is empty
    gone_on(model, after, 20, route=route(2, IDS[:, 20:]))

    def names(cache):
        layer = cache.layers[-1]
        assert layer.acting in (old, model.pack)
        return chunk_keys(layer, IDS, ROOT, layer.acting.acting)[0]

    assert not set(names(before)) & set(names(after))
    fresh, same = started(model, 40, 1), started(mounted(make_llama()), 40, 1)
    assert names(fresh) == chunk_keys(same.layers[-1], IDS, ROOT, same.layers[-1].acting.acting)[0]


def test_sequences_that_begin_after_an_unloading_never_meet_the_expert():
    model = mounted(make_llama())
    with torch.no_grad():
        model.router.policy.actor.net.out.bias[2] = 50.0  # b, whatever is said
    assert chosen(model) == {2}
    model.unload("b")
    assert 2 not in chosen(model)
    base = make_llama()
    assert torch.equal(logits(model, route=route(2)), base(input_ids=IDS, use_cache=False).logits)
    with pytest.raises(ValueError, match="no expert 'x'"):
        model.unload("x")
    assert "b unloaded" in repr(model)


def test_a_copied_cache_goes_on_under_the_same_pack():
    model = mounted(make_llama())
    cache = started(model, 20, 2)
    twin = copy.deepcopy(cache)
    assert twin.layers[-1].acting is cache.layers[-1].acting
    model.unload("b")
    assert torch.equal(gone_on(model, twin, 20), gone_on(model, cache, 20))


def test_a_cache_of_other_weights_on_another_model_is_refused():
    model, other = mounted(make_llama()), mounted(make_llama())
    cache = started(model, 20, 1)
    with torch.no_grad():
        next(iter(other.stacks.values())).u["0"].mul_(2.0)
    with pytest.raises(CacheError, match="filled under"):
        gone_on(other, cache, 20)


# --- shadows ---------------------------------------------------------------------------------------


def test_a_shadow_answers_as_the_live_one_on_the_same_base_tensors():
    live = mounted(make_llama(), confidence=0.5, fallback="a", trust_radius=0.2)
    live.unload("c")
    random = torch.random.get_rng_state()
    shadow = live.shadow()
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(logits(shadow), logits(live))
    assert shadow.pack.expert_digests == live.pack.expert_digests
    theirs = {n: p for n, p in live.base.named_parameters() if ".bem_" not in n}
    ours = {n: p for n, p in shadow.base.named_parameters() if ".bem_" not in n}
    assert all(p is theirs[n] for n, p in ours.items())
    own = {id(p) for p in live.parameters()}
    assert not any(id(p) in own for p in shadow.parameters())
    asked = {"input_ids": IDS[:, :9], "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(shadow.model.generate(**asked), live.model.generate(**asked))


@pytest.mark.parametrize("what", ["experts", "router"])
def test_the_live_one_answers_to_the_bit_as_before_while_its_shadow_trains(what):
    live = mounted(make_llama())
    expected, seen, stop = logits(live), [], threading.Event()
    asked = {"input_ids": IDS[:, :9], "max_new_tokens": 20, "do_sample": False}
    written = live.model.generate(**asked)

    def answer():
        try:
            while not stop.is_set():
                seen.append(torch.equal(logits(live), expected))
                seen.append(torch.equal(live.model.generate(**asked), written))
        except Exception as error:  # it belongs to the test, not to the thread
            seen.append(error)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        shadows = [trained(live.shadow(), what=what) for _ in range(3)]
        while len(seen) < 4 and thread.is_alive():
            trained(shadows[0], what=what)
    finally:
        stop.set()
        thread.join()
    assert len(seen) >= 4 and all(one is True for one in seen), seen[-1]
    assert torch.equal(logits(live), expected)
    changed = [p for s in shadows for p in s.parameters()]
    assert changed and all(not p.requires_grad and p.grad is None for p in live.parameters())
    before, after = (
        [p for m in (x.router, *x.stacks.values()) for p in m.parameters()]
        for x in (live, shadows[0])
    )
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_adopting_a_shadow_moves_one_pointer_and_running_sequences_stay():
    live = mounted(make_llama())
    running, twin = started(live, 20, 1), started(live, 20, 1)
    shadow = trained(trained(live.shadow()), what="router")
    expected = gone_on(live, twin, 20)
    live.adopt(shadow)
    assert torch.equal(answers(live), answers(shadow)) and live.pack.digest == shadow.pack.digest
    assert all(a is b for a, b in zip(live.pack.members, shadow.pack.members, strict=True))
    assert torch.equal(gone_on(live, running, 20), expected)
    adopted = answers(live)
    trained(trained(shadow), what="router")  # what becomes of it afterwards is its own affair
    assert torch.equal(answers(live), adopted) and not torch.equal(answers(shadow), adopted)


def test_what_was_adopted_is_what_is_saved(tmp_path):
    live = mounted(make_llama())
    live.adopt(trained(trained(live.shadow()), what="router"))
    again = bem.load_router(make_llama(), live.save(tmp_path / "router"))
    assert torch.equal(answers(again), answers(live))
    assert again.pack.expert_digests == live.pack.expert_digests


def test_adopting_while_another_thread_answers_shows_the_old_or_the_new_and_nothing_between():
    live = mounted(make_llama())
    shadow = trained(trained(live.shadow()), what="router")
    with torch.no_grad():
        for model in (live, shadow):  # whatever is said, the first expert answers
            model.router.policy.actor.net.out.bias[1] = 1e3
    allowed, seen, stop = [logits(live), logits(shadow)], [], threading.Event()

    def answer():
        try:
            while not stop.is_set():
                actual = logits(live)
                seen.append([torch.equal(actual, one) for one in allowed].index(True))
        except Exception as error:
            seen.append(error)

    thread = threading.Thread(target=answer)
    thread.start()
    while len(seen) < 2 and thread.is_alive():
        pass
    live.adopt(shadow)
    count = len(seen)
    while len(seen) < count + 3 and thread.is_alive():
        pass
    stop.set()
    thread.join()
    assert set(seen) == {0, 1} and seen == sorted(seen), seen


def test_only_a_shadow_of_this_model_is_adopted():
    live = mounted(make_llama())
    with pytest.raises(AttachError, match="shares the base's tensors"):
        live.adopt(mounted(make_llama()))
    shadow = live.shadow()
    narrower = bem.mount(bem.adapters.copies.without_adapter(live), live.experts[:2], chunk_size=8)
    with pytest.raises(AttachError, match="other experts"):
        live.adopt(narrower)
    before = logits(live)
    with torch.no_grad():
        next(iter(shadow.stacks.values())).u["0"][0, 0] = float("nan")
    with pytest.raises(AttachError, match="NaN or infinite weights"):
        live.adopt(shadow)
    assert torch.equal(logits(live), before)


@pytest.mark.parametrize("variant", ["s0", "pt1", "v1", "v2", "v3", "v4"])
def test_a_single_adapter_has_a_shadow_too(variant):
    live = bem.attach(make_llama(), variant, rank=4, chunk_size=8)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    live.model.train()
    live.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()  # leaves a graph behind
    live.model.eval()
    expected, random = logits(live), torch.random.get_rng_state()
    shadow = shadow_of(live)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(logits(shadow), expected)
    with torch.no_grad():
        for parameter in shadow.parameters():
            parameter.add_(0.1)
    assert torch.equal(logits(live), expected) and not torch.equal(logits(shadow), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_mounted_model_may_be_cast_and_decides_in_float32_still(dtype):
    model = mounted(make_llama())
    before, path = logits(model), chosen(model)
    policy = {n: p.clone() for n, p in model.router.policy.state_dict().items()}
    model.model.to(dtype)
    assert logits(model).dtype == dtype and chosen(model) == path
    out = model.model.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert out.shape == (2, 52)
    assert all(torch.equal(p, policy[n]) for n, p in model.router.policy.state_dict().items())
    model.model.float()
    tolerance = 1e-4 if dtype == torch.float64 else 0.2
    assert (logits(model) - before).abs().max() < tolerance


def held(mounted_, *packs):
    """Bytes of the experts' parameters and of what acts; a storage counts once."""
    tensors = [p for stack in mounted_.stacks.values() for p in stack.parameters()]
    tensors += [t for pack in packs for m in pack.members for t in (m.rows_of_u, m.v)]
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_experts_are_held_once_whatever_happened_to_them(tmp_path):
    model = mounted(make_llama())
    once = held(model)
    assert once == sum(4 * p.numel() for s in model.stacks.values() for p in s.parameters())
    assert held(model, model.pack) == once
    with model.training("experts"):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    assert held(model, model.pack) == once
    model.save(tmp_path / "router")
    again = bem.load_router(make_llama(), tmp_path / "router")
    assert held(again, again.pack) == once
    shadow = model.shadow()
    model.adopt(shadow)
    assert held(model, model.pack, shadow.pack) == once  # one slab for both
    model.unload("a")
    assert held(model, model.pack) == once


def test_training_leaves_the_pack_that_a_running_sequence_holds():
    model = mounted(make_llama())
    pack = model.pack
    before = [m.rows_of_u.clone() for m in pack.members], [m.v.clone() for m in pack.members]
    with model.training("experts"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        ids = torch.arange(3, 23)[None]
        model.model(input_ids=ids, labels=ids, route=torch.ones_like(ids)).loss.backward()
        optimizer.step()
    assert all(map(torch.equal, (m.rows_of_u for m in pack.members), before[0]))
    assert all(map(torch.equal, (m.v for m in pack.members), before[1]))
    assert model.pack is not pack
