"""S0 is PEFT's LoRA: same logits, and each reads the other's checkpoints."""

import json

import peft
import pytest
import torch

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import tiny_model
from bem.errors import AttachError, CheckpointError


def lora(model, **settings):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["o_proj", "down_proj"],
        task_type="CAUSAL_LM",
        **settings,
    )
    wrapped = peft.get_peft_model(model, config).eval()
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    return wrapped


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2}}])
def test_a_peft_lora_loads_as_s0_with_the_same_logits(tmp_path, settings):
    wrapped = lora(tiny_model("llama"), **settings)
    wanted = probe.logits(wrapped, probe.token_ids())
    wrapped.save_pretrained(tmp_path)
    attached = bem.load(tiny_model("llama"), tmp_path)
    assert attached.config.variant == "s0"
    assert torch.allclose(probe.logits(attached.model, probe.token_ids()), wanted, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_s0_loads_in_peft_with_the_same_logits(tmp_path, architecture):
    attached = probe.perturbed(bem.attach(tiny_model(architecture), "s0", rank=4, rank_mlp=2))
    wanted = probe.logits(attached.model, probe.token_ids())
    attached.save_lora(tmp_path)
    wrapped = peft.PeftModel.from_pretrained(tiny_model(architecture), str(tmp_path))
    assert torch.allclose(probe.logits(wrapped, probe.token_ids()), wanted, atol=1e-5)


def test_a_lora_that_leaves_layers_out_leaves_them_out(tmp_path):
    wrapped = lora(tiny_model("llama"), layers_to_transform=[1, 3])
    wanted = probe.logits(wrapped, probe.token_ids())
    wrapped.save_pretrained(tmp_path)
    assert torch.allclose(
        probe.logits(bem.load(tiny_model("llama"), tmp_path).model, probe.token_ids()),
        wanted,
        atol=1e-5,
    )


def test_dora_is_refused_with_the_reason(tmp_path):
    lora(tiny_model("llama"), use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="use_dora"):
        bem.load(tiny_model("llama"), tmp_path)


def test_a_lora_on_queries_is_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="q_proj"):
        bem.load(tiny_model("llama"), tmp_path)


def test_a_routed_adapter_is_no_plain_lora(tmp_path):
    with pytest.raises(AttachError, match="only s0"):
        bem.attach(tiny_model("llama"), "v1", rank=4).save_lora(tmp_path)


def test_gradients_equal_those_of_peft():
    wrapped = lora(tiny_model("llama"))
    attached = bem.attach(tiny_model("llama"), "s0", rank=4, alpha=12, router_layer=0)
    theirs = {
        n.replace(".default.weight", ""): p for n, p in wrapped.named_parameters() if "lora_" in n
    }
    ours = dict(attached.named_parameters())
    for name, parameter in ours.items():
        key = name.replace("bem_update.default.v", "lora_A").replace(
            "bem_update.default.u", "lora_B"
        )
        parameter.data.copy_(theirs[f"base_model.model.{key}"])
    for model in (wrapped, attached.model):
        model(
            input_ids=probe.token_ids(), labels=probe.token_ids(), use_cache=False
        ).loss.backward()
    for name, parameter in ours.items():
        key = name.replace("bem_update.default.v", "lora_A").replace(
            "bem_update.default.u", "lora_B"
        )
        assert torch.allclose(parameter.grad, theirs[f"base_model.model.{key}"].grad, atol=1e-5)


def test_the_trust_radius_holds_after_a_step():
    attached = probe.perturbed(bem.attach(tiny_model("llama"), "s0", rank=4, trust_radius=0.5))
    attached.after_step()
    for module in attached.modules():
        assert torch.linalg.matrix_norm(module.scale * module.u @ module.v) <= 0.5 + 1e-5


def test_the_written_lora_names_its_ranks(tmp_path):
    bem.attach(tiny_model("llama"), "s0", rank=4, rank_mlp=2).save_lora(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4 and set(config["rank_pattern"].values()) == {2}
