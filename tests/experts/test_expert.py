"""An expert read from a file is the adapter that was saved, or it is refused with the reason."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import tiny_model
from bem.errors import AttachError, BaseMismatch, CheckpointError
from bem.experts.expert import Update, expert_of, from_updates, read_expert, write_lora


def merged(architecture, updates):
    """The oracle: u @ v added to the weights themselves."""
    model = tiny_model(architecture)
    for site, update in updates.items():
        delta = update.u @ update.v
        weight = model.get_submodule(site).weight
        weight.data += delta.T if architecture == "gpt2" else delta  # Conv1D keeps (in, out)
    return model


def peft_lora(architecture="llama", targets=("o_proj", "down_proj"), **settings):
    config = {"r": 4, "lora_alpha": 12, "target_modules": list(targets), "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(
        tiny_model(architecture), peft.LoraConfig(**{**config, **settings})
    ).eval()
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    return wrapped


def s0(architecture="llama", **settings):
    return probe.perturbed(bem.attach(tiny_model(architecture), "s0", **settings))


def change_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"o_proj": 5}},
        {"rank_pattern": {r"layers\.[12]\.mlp\.down_proj": 3}},
        {"layers_to_transform": [1, 3]},
        {"target_modules": ["o_proj"], "init_lora_weights": "gaussian"},
    ],
)
def test_a_peft_lora_is_read_as_what_peft_computes(tmp_path, settings):
    wrapped = peft_lora(**settings)
    wrapped.save_pretrained(tmp_path)
    expert = read_expert(tmp_path, tiny_model("llama"))
    assert torch.allclose(
        probe.logits(merged("llama", expert.updates), probe.token_ids()),
        probe.logits(wrapped, probe.token_ids()),
        atol=1e-5,
    )


def test_a_lora_of_gpt2_whose_layers_are_transposed_is_read(tmp_path):
    wrapped = peft_lora("gpt2", ["attn.c_proj", "mlp.c_proj"], fan_in_fan_out=True)
    wrapped.save_pretrained(tmp_path)
    expert = read_expert(tmp_path, tiny_model("gpt2"))
    assert torch.allclose(
        probe.logits(merged("gpt2", expert.updates), probe.token_ids()),
        probe.logits(wrapped, probe.token_ids()),
        atol=1e-5,
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_our_s0_is_read_from_its_checkpoint_and_from_the_live_model_alike(tmp_path, architecture):
    attached = s0(architecture, rank=4, rank_mlp=2, alpha=6.0)
    attached.save(tmp_path / "sql")
    read = read_expert(tmp_path / "sql", tiny_model(architecture))
    live = expert_of(attached, "sql")
    assert read.name == "sql" and read.digest == live.digest
    assert torch.allclose(
        probe.logits(merged(architecture, read.updates), probe.token_ids()),
        probe.logits(attached.model, probe.token_ids()),
        atol=1e-5,
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_written_lora_gives_the_same_logits_in_peft(tmp_path, architecture):
    updates = expert_of(s0(architecture, rank=4, rank_mlp=2), "e").updates
    write_lora(updates, tmp_path, base_name="some/base")
    wrapped = peft.PeftModel.from_pretrained(tiny_model(architecture), str(tmp_path))
    assert torch.allclose(
        probe.logits(wrapped, probe.token_ids()),
        probe.logits(merged(architecture, updates), probe.token_ids()),
        atol=1e-5,
    )
    assert (
        read_expert(tmp_path, tiny_model(architecture)).digest == from_updates("", updates).digest
    )


def test_the_digest_is_of_the_weights_and_not_of_the_name(tmp_path):
    update = Update(torch.ones(3, 1), torch.ones(1, 2))
    one = from_updates("one", {"a": update})
    assert one.digest == from_updates("two", {"a": replace(update)}, "elsewhere").digest
    others = [
        {"b": update},
        {"a": Update(2 * update.u, update.v)},
        {"a": Update(torch.ones(2, 1), torch.ones(1, 3))},  # the same bytes in another shape
    ]
    assert one.digest not in {from_updates("one", other).digest for other in others}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA rescales the whole weight"),
        ({"lora_bias": True}, "a bias is no low-rank update"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole modules"),
        ({"bias": "lora_only"}, "biases of the base"),
        ({"trainable_token_indices": [1]}, "changes embeddings"),
        ({"alora_invocation_tokens": [1]}, "invocation tokens"),
    ],
)
def test_more_than_a_lora_is_refused_with_the_reason(tmp_path, settings, reason):
    peft_lora(**settings).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=reason):
        read_expert(tmp_path, tiny_model("llama"))


def test_a_start_that_changes_the_base_is_refused(tmp_path):
    peft_lora(init_lora_weights="pissa").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"pissa.*also changes the weights of the base"):
        read_expert(tmp_path, tiny_model("llama"))


def test_any_linear_layer_of_the_blocks_is_read_and_no_other(tmp_path):
    peft_lora(targets=["q_proj", "v_proj", "up_proj"]).save_pretrained(tmp_path / "keys")
    ends = {
        site.rpartition(".")[2]
        for site in read_expert(tmp_path / "keys", tiny_model("llama")).updates
    }
    assert ends == {"q_proj", "v_proj", "up_proj"}
    peft_lora(targets=["lm_head", "o_proj"]).save_pretrained(tmp_path / "head")
    with pytest.raises(CheckpointError, match=r"Train it without output head"):
        read_expert(tmp_path / "head", tiny_model("llama"))


def test_s0_stays_on_its_two_sites_and_says_how_to_use_other_loras(tmp_path):
    peft_lora(targets=["up_proj"]).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"can be mounted as an expert .*\['down_proj', 'o_proj'\]"
    ):
        bem.load(tiny_model("llama"), tmp_path)


def test_a_lora_for_another_model_is_refused(tmp_path):
    peft_lora().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not have: made for another"):
        read_expert(tmp_path, tiny_model("gpt2"))
    small = {"model.layers.0.self_attn.o_proj": Update(torch.ones(8, 1), torch.ones(1, 8))}
    write_lora(small, tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"is \(32, 32\) \(out, in\) in this model"):
        read_expert(tmp_path / "small", tiny_model("llama"))


@pytest.mark.parametrize("variant", ["pt1", "v1", "v2", "v4"])
def test_a_variant_that_changes_from_chunk_to_chunk_must_be_distilled_first(tmp_path, variant):
    attached = bem.attach(tiny_model("llama"), variant, rank=4)
    attached.save(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"chunk to chunk\. Distil it into a static LoRA first"
    ):
        read_expert(tmp_path, tiny_model("llama"))
    with pytest.raises(AttachError, match="Distil it into a static LoRA first"):
        expert_of(attached, "x")


def test_a_kronecker_update_must_be_distilled_first(tmp_path):
    bem.attach(tiny_model("llama"), "v3", rank=2).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"Kronecker.*Distil it into a static LoRA first"):
        read_expert(tmp_path, tiny_model("llama"))


def test_an_expert_of_another_base_is_refused(tmp_path):
    s0(rank=2).save(tmp_path)
    other = tiny_model("llama")
    other.lm_head.weight.data += 1.0
    with pytest.raises(BaseMismatch, match="Load the base that it was trained on"):
        read_expert(tmp_path, other)


def test_a_changed_checkpoint_is_refused(tmp_path):
    s0(rank=2).save(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({n: t + 1 for n, t in load_file(weights).items()}, weights)
    with pytest.raises(CheckpointError, match="changed after saving"):
        read_expert(tmp_path, tiny_model("llama"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, bad):
    wrapped = peft_lora()
    next(p for n, p in wrapped.named_parameters() if "lora_B" in n).data[0, 0] = bad
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="1 NaN or infinite weights"):
        read_expert(tmp_path, tiny_model("llama"))


def test_broken_files_are_named(tmp_path):
    peft_lora().save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    change_config(tmp_path, r=3)
    with pytest.raises(CheckpointError, match="the config says rank 3"):
        read_expert(tmp_path, tiny_model("llama"))
    change_config(tmp_path, r=4)
    save_file(dict(list(tensors.items())[1:]), weights)
    with pytest.raises(CheckpointError, match="alone"):
        read_expert(tmp_path, tiny_model("llama"))
    weights.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_expert(tmp_path, tiny_model("llama"))
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle, which can run code"):
        read_expert(tmp_path, tiny_model("llama"))


def test_what_is_nowhere_is_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="is neither a folder nor a hub id"):
        read_expert(tmp_path / "gone", tiny_model("llama"))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="could not be read from the hub") as error:
        read_expert("nobody/no-such-adapter", tiny_model("llama"))
    assert "\n" not in str(error.value)


def test_factors_without_a_product_and_empty_experts_are_refused():
    with pytest.raises(CheckpointError, match="have no product"):
        from_updates("x", {"a": Update(torch.ones(3, 2), torch.ones(1, 3))})
    with pytest.raises(CheckpointError, match="no update at all"):
        from_updates("x", {})
    with pytest.raises(CheckpointError, match="every site is empty"):
        write_lora({}, "nowhere")
