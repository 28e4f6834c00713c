"""Experts mounted on a model are exactly the LoRAs they were; what is saved is what loads."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

import bem
from bem import files
from bem.adapters.checks import check_adapter
from bem.control.keys import ChunkKey, chunk_keys
from bem.errors import AttachError, BaseMismatch, CheckpointError
from bem.experts.expert import from_updates
from bem.routing.mounted import is_router
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
        routed = mounted(model)
        routed.router.available[0] = False
        return routed

    check_adapter(never_the_base, [arch], checks).raise_if_failed()


@pytest.mark.parametrize(
    "settings",
    [
        {"trust_radius": 0.1, "shared": "c"},
        {"confidence": 0.5, "fallback": "a", "trust_radius": 0.1, "trust_norm": "spectral"},
    ],
)
@pytest.mark.parametrize("composed", ["beforehand", "for each chunk"])
def test_the_price_of_a_routed_stack_is_what_runs(monkeypatch, settings, composed):
    if composed == "for each chunk":
        monkeypatch.setattr("bem.routing.composer.Rules.tabled", lambda *_: False)
    make = lambda model: mounted(model, **settings)  # noqa: E731
    check_adapter(make, ["llama"], ["price_is_true"]).raise_if_failed()


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


def perturbed(model):
    """Weights in no canonical form, a policy that decides."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for stack in model.stacks.values():
            for parameter in stack.parameters():
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
        for parameter in model.router.policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("unloaded", [None, "b"])
def test_saving_and_loading_changes_no_logit_and_no_digest_however_often(tmp_path, unloaded):
    model = perturbed(mounted(make_llama(), confidence=0.5, fallback="a", trust_radius=0.2))
    if unloaded:
        model.unload(unloaded)
    expected, digests, config = logits(model.model), model.pack.expert_digests, model.router_config
    version = model.version
    assert version.weights["expert a"] == digests[0] and set(version.sites) == set(model.stacks)
    per_expert = [logits(model.model, route=route(option)) for option in (1, 2, 3)]
    for number in range(3):
        folder = model.save(tmp_path / f"router-{number}")
        model = bem.load_router(make_llama(), folder)
        assert torch.equal(logits(model.model), expected)
        assert model.pack.expert_digests == digests
        assert tuple(e.digest for e in model.experts) == digests
        assert model.router_config == config and model.version == version
        for option, was in enumerate(per_expert, 1):
            assert torch.equal(logits(model.model, route=route(option)), was)
        assert model.router.available.tolist() == [True, True, unloaded is None, True]


def test_a_router_that_was_never_trained_stays_untrained_through_a_folder(tmp_path):
    folder = mounted(make_llama(), trained=False).save(tmp_path / "router")
    assert not bem.load_router(make_llama(), folder).router.trained
    base = logits(make_llama())
    assert torch.equal(logits(bem.load_router(make_llama(), folder).model), base)


def test_until_it_is_trained_the_bare_base_answers_and_that_is_said(caplog):
    model, base = mounted(make_llama(), trained=False), make_llama()
    assert torch.equal(logits(model.model), logits(base))
    assert [r.getMessage() for r in caplog.records if "never trained" in r.getMessage()]
    assert "not trained: the bare base answers" in repr(model)
    asked = {"input_ids": IDS[:1, :9], "max_new_tokens": 24, "do_sample": False}
    assert torch.equal(model.model.generate(**asked), base.generate(**asked))
    assert (logits(model.model, route=route(1)) - logits(base)).abs().max() > 1e-2
    with model.training("router"):
        pass
    assert (logits(model.model) - logits(base)).abs().max() > 1e-2 and "not trained" not in repr(
        model
    )


def test_training_that_breaks_off_leaves_a_router_untrained():
    model = mounted(make_llama(), trained=False)
    with pytest.raises(RuntimeError, match="full disk"), model.training("router"):
        raise RuntimeError("full disk")
    assert not model.router.trained


@pytest.mark.parametrize(
    "name",
    [
        "../../evil",
        "/evil",
        "a/b",
        "a\\b",
        "..",
        ".",
        ".hidden",
        "",
        " a",
        "a ",
        "a\nb",
        "a\0b",
        "c:x",
        "e" * 101,
        "base",
    ],
)
def test_a_name_that_is_no_folder_inside_the_target_is_refused(tmp_path, name):
    odd = from_updates(name, expert(make_llama(), "a", 4, 0).updates)
    model = make_llama()
    with pytest.raises(AttachError, match="name"):
        bem.mount(model, [odd])
    assert not getattr(model, "peft_config", None)
    mount = mounted(make_llama())
    mount.experts[0] = replace(mount.experts[0], name=name)
    with pytest.raises((AttachError, ValueError)):
        mount.save(tmp_path / "inside" / "router")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_manifest_that_names_a_folder_outside_is_refused(tmp_path):
    folder = mounted(make_llama()).save(tmp_path / "router")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["experts"][0]["name"] = "../../evil"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(AttachError, match="cannot name an expert"):
        bem.load_router(make_llama(), folder)


@pytest.mark.parametrize("names", [("sql", "SQL"), ("a", "a")])
def test_names_that_are_one_folder_somewhere_are_refused(names):
    experts = [replace(expert(make_llama(), "x", 4, i), name=n) for i, n in enumerate(names)]
    with pytest.raises(AttachError, match="different names"):
        bem.mount(make_llama(), experts)


def test_saving_deletes_nothing_that_was_not_written_here(tmp_path, monkeypatch):
    model = mounted(make_llama())
    (tmp_path / "thesis.txt").write_text("x")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    for target in (tmp_path, ".", tmp_path / "thesis.txt"):
        with pytest.raises(CheckpointError, match=r"not written here|is a file"):
            model.save(target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "thesis.txt"]
    folder = model.save(tmp_path / "router")
    (folder / "experts" / "a" / "notes.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.md"):
        model.save(folder)
    (folder / "experts" / "a" / "notes.md").unlink()
    model.save(folder)  # its own, again


def test_every_expert_names_its_base(tmp_path):
    import peft

    make_llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    folder = mounted(base).save(tmp_path / "router")
    for name in "abc":
        lora = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "experts" / name)
        assert lora.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


def test_a_router_is_known_by_its_manifest(tmp_path):
    folder = mounted(make_llama()).save(tmp_path / "router")
    assert is_router(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=None, separators=(",", ":")))
    assert is_router(folder)
    bem.attach(make_llama(), "s0", rank=2).save(
        tmp_path / "s0", extra={"note": '"kind": "router"', "kind": "router"}
    )
    assert not is_router(tmp_path / "s0") and not is_router(tmp_path)
    manifest["format"] = 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="has format 1, this version reads 2"):
        bem.load_router(make_llama(), folder)


def test_a_changed_file_or_another_base_is_refused(tmp_path):
    folder = mounted(make_llama()).save(tmp_path / "router")
    with pytest.raises(BaseMismatch, match="made for a base with digest"):
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


def test_a_base_in_another_dtype_is_refused_with_what_to_do(tmp_path):
    folder = mounted(make_llama()).save(tmp_path / "router")
    with pytest.raises(BaseMismatch, match=r"Load the base with dtype='float32'"):
        bem.load_router(make_llama().to(torch.bfloat16), folder)


def test_experts_that_trained_in_float32_on_a_bfloat16_base_come_back_bit_for_bit(tmp_path):
    model = mounted(make_llama().to(torch.bfloat16))
    with model.training("experts"), torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter += torch.randn_like(parameter) / 8  # numbers that bfloat16 does not have
    folder = model.save(tmp_path / "router")
    again = bem.load_router(make_llama().to(torch.bfloat16), folder)
    assert again.version == model.version
    ids = torch.randint(2, 320, (1, 90))
    assert torch.equal(again.model(ids).logits, model.model(ids).logits)


def test_a_policy_of_another_router_is_refused_and_the_model_is_left_as_it_was(tmp_path):
    folder = mounted(make_llama()).save(tmp_path / "router")
    other = mounted(make_llama(), seed=9).save(tmp_path / "other")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "router.safetensors").write_bytes((other / "router.safetensors").read_bytes())
    digest = files.sha256_file(folder / "router.safetensors")
    manifest["files"]["router.safetensors"] = digest
    (folder / "manifest.json").write_text(json.dumps(manifest))
    model, before = make_llama(), logits(make_llama())
    with pytest.raises(CheckpointError, match="not the version that its manifest names"):
        bem.load_router(model, folder)
    assert not hasattr(model, "peft_config") and torch.equal(logits(model), before)
    mounted(model)


def test_more_sites_than_peft_lists_by_name():
    model = make_llama(num_hidden_layers=14)
    experts = [expert(model, name, 2, i, layer=0) for i, name in enumerate("ab")]
    routed = bem.mount(model, experts, chunk_size=8)
    assert len(routed.stacks) == 28
    assert (logits(routed.model, route=route(1)) - logits(routed.model)).abs().max() > 1e-3


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
        root = ChunkKey.root("base", torch.float32, 8, "tokenizer")
        return chunk_keys(out.past_key_values.layers[-1], IDS, root, model.acting)[0]

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
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
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
            packed = stack.at(torch.float32)
            delta = packed.u.double() * c.double() @ packed.v.double()
            size = float(torch.linalg.matrix_norm(delta, ord=order))
            assert size <= limit
            largest = max(largest, size / limit)
        start += stack.control_width
    assert largest > 0.9  # it was needed
