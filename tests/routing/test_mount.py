"""Experts mounted on a model are exactly the LoRAs they were; what is saved is what loads."""

import json

import pytest
import torch

import bem
from bem.adapters.checks import check_adapter
from bem.control.keys import chunk_keys
from bem.errors import AttachError, BaseMismatch, CheckpointError
from tests.conftest import make_llama
from tests.routing.mounted import expert, mounted

IDS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))


def logits(model, **given):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **given).logits


def route(option: int):
    return torch.full_like(IDS, option)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "falcon"])
def test_a_routed_model_keeps_the_adapter_contract(arch):
    checks = [
        "detach_restores",
        "disable_restores",
        "blind_to_the_future",
        "cache_is_exact",
        "padding_is_invisible",
        "generation_is_exact",
        "turns_restart_chunks",
    ]

    def never_the_base(model):
        found = mounted(model)
        found.router.available[0] = False
        return found

    check_adapter(never_the_base, [arch], checks).raise_if_failed()


def test_every_expert_is_the_lora_that_it_was(tmp_path):
    import peft

    folder = mounted(make_llama()).save(tmp_path / "router")
    routed = bem.load_router(make_llama(), folder)
    base = logits(make_llama())
    torch.testing.assert_close(logits(routed.model, route=route(0)), base)
    for option, name in enumerate("abc", 1):
        lora = peft.PeftModel.from_pretrained(make_llama(), str(folder / "experts" / name))
        wanted = logits(lora)
        torch.testing.assert_close(
            logits(routed.model, route=route(option)), wanted, atol=1e-5, rtol=1e-5
        )
        assert (wanted - base).abs().max() > 1e-2


def test_rows_of_a_batch_follow_different_experts():
    model = mounted(make_llama())
    options = torch.tensor([[1], [3]]).expand_as(IDS)
    both = logits(model.model, route=options)
    for row, option in ((0, 1), (1, 3)):
        alone = logits(model.model, route=route(option))[row]
        torch.testing.assert_close(both[row], alone, atol=1e-5, rtol=1e-5)


def test_a_shared_expert_is_always_there():
    names = (("a", 4, 0), ("b", 4, 1), ("both", 2, 2))
    experts = [expert(make_llama(), *each) for each in names]
    model = bem.mount(make_llama(), experts, shared="both", chunk_size=8)
    assert model.router.space.experts == ("a", "b")
    alone = bem.mount(make_llama(), experts[2:], chunk_size=8)
    wanted = logits(alone.model, route=route(1))
    torch.testing.assert_close(logits(model.model, route=route(0)), wanted, atol=1e-5, rtol=1e-5)


def test_what_was_saved_is_what_loads(tmp_path):
    model = mounted(make_llama(), confidence=0.5, fallback="a")
    with torch.no_grad():
        for parameter in model.router.policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    wanted = logits(model.model)
    folder = model.save(tmp_path / "router")
    again = bem.load_router(make_llama(), folder)
    torch.testing.assert_close(logits(again.model), wanted, atol=1e-5, rtol=1e-5)
    assert again.router_config == model.router_config


def test_a_changed_file_or_another_base_is_refused(tmp_path):
    folder = mounted(make_llama()).save(tmp_path / "router")
    with pytest.raises(BaseMismatch, match="made for a base"):
        bem.load_router(make_llama(vocab_size=321), folder)
    weights = folder / "experts" / "a" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="was changed"):
        bem.load_router(make_llama(), folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        bem.load_router(make_llama(), folder)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"kind": "something"}))
    with pytest.raises(CheckpointError, match="single adapter"):
        bem.load_router(make_llama(), folder)


def test_impossible_mounts_are_refused_with_the_reason():
    one = expert(make_llama(), "a", 4, 0)
    low = expert(make_llama(), "low", 4, 0, layer=0)
    with pytest.raises(AttachError, match="different names"):
        bem.mount(make_llama(), [one, one])
    with pytest.raises(AttachError, match="1 to 64"):
        bem.mount(make_llama(), [])
    with pytest.raises(AttachError, match="Set router_layer to 0"):
        bem.mount(make_llama(), [one, low], router_layer=1)
    assert bem.mount(make_llama(), [one, low]).router_config.router_layer == 0
    with pytest.raises(AttachError, match="no shared expert 'b'"):
        bem.mount(make_llama(), [one], shared="b")
    with pytest.raises(AttachError, match="orthogonal"):
        mounted(make_llama(), orthogonal=True)
    carrying = mounted(make_llama())
    with pytest.raises(AttachError, match="already carries"):
        bem.mount(carrying.base, [one])


def test_64_experts_stand_side_by_side():
    experts = [expert(make_llama(), f"e{n}", 1, n) for n in range(64)]
    model = bem.mount(make_llama(), experts, chunk_size=8)
    assert torch.isfinite(logits(model.model)).all()
    with pytest.raises(AttachError, match="1 to 64"):
        bem.mount(make_llama(), [*experts, expert(make_llama(), "one more", 1, 64)])


def test_a_chunk_keeps_its_name_while_the_experts_that_acted_in_it_stay(tmp_path):
    def keys(model):
        first = torch.where(torch.arange(40) < 16, 1, 2).expand_as(IDS)
        with torch.no_grad():
            out = model.model(input_ids=IDS, route=first, use_cache=True)
        return chunk_keys(out.past_key_values.layers[-1], IDS, model.acting)[0]

    names = (("a", 4, 0), ("b", 4, 1))
    old = [expert(make_llama(), *each) for each in names]
    release = [old[0], expert(make_llama(), "b", 4, 9)]  # b was trained anew
    before = keys(bem.mount(make_llama(), old, chunk_size=8))
    after = keys(bem.mount(make_llama(), release, chunk_size=8, seed=5))  # and another router
    assert before[:2] == after[:2] and not set(before[2:]) & set(after[2:])


def test_experts_train_under_a_given_route_and_the_others_stay():
    model = mounted(make_llama())
    before = {n: model.updates_of(n) for n in "abc"}
    with model.training("experts"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = model.model(input_ids=IDS, labels=IDS, route=route(2), use_cache=False).loss
        loss.backward()
        optimizer.step()
    after = {n: model.updates_of(n) for n in "abc"}
    for name in "abc":
        moved = max(
            float((after[name][s].u @ after[name][s].v - u.u @ u.v).abs().max())
            for s, u in before[name].items()
        )
        assert (moved > 1e-5) == (name == "b")
    assert not any(p.requires_grad for p in model.model.parameters())


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("relative", [False, True])
def test_no_chunk_of_any_site_ever_leaves_the_trust_region(norm, relative):
    radius = 0.02 if relative else 0.1
    model = mounted(
        make_llama(), trust_radius=radius, trust_norm=norm, trust_relative=relative, confidence=0.6
    )
    with torch.no_grad():
        model.router.policy.actor.net.out.weight.normal_(std=2.0)
        out = model.model(input_ids=IDS, use_cache=True)
    _, applied = out.past_key_values.layers[-1].applied()
    order, largest = (2 if norm == "spectral" else "fro"), 0.0
    start = 0
    for site, stack in model.stacks.items():
        weight = model.base.get_submodule(site).base_layer.weight
        limit = radius * float(torch.linalg.matrix_norm(weight, ord=order)) if relative else radius
        for c in applied[:, 1:, start : start + stack.control_width].flatten(0, 1):
            delta = stack.u.double() * c.double() @ stack.v.double()
            found = float(torch.linalg.matrix_norm(delta, ord=order))
            assert found <= limit * (1 + 1e-6)
            largest = max(largest, found / limit)
        start += stack.control_width
    assert largest > 0.9  # it was needed
