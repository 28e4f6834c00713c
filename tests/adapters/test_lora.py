"""Whether PEFT itself would put a LoRA where ours stands."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import ARCHITECTURES, tiny_model
from bem.adapters.lora import missed_by_peft
from bem.adapters.sites import find_sites

IDS = torch.arange(1, 21)[None]


def shared_expert():
    """PEFT takes the name of the shared expert's way down for that of the fused experts."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    return Qwen3NextForCausalLM(config).eval()


def state_space():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=4, state_size=8)
    return MambaForCausalLM(config).eval()


def sites(model):
    return [s.name for s in find_sites(model).found]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_puts_a_lora_onto_the_sites_of_usual_models(architecture):
    model = tiny_model(architecture)
    assert missed_by_peft(model, sites(model)) == ""


def test_the_skeleton_is_asked_what_the_model_would_say():
    model = shared_expert()
    wanted = sites(model)
    config = LoraConfig(r=2, target_modules=wanted, task_type="CAUSAL_LM")
    theirs = get_peft_model(shared_expert(), config).base_model.model
    missed = [n for n in wanted if not hasattr(theirs.get_submodule(n), "lora_A")]
    assert missed, "PEFT has learned it: the warning can go"
    assert missed[0] in missed_by_peft(model, wanted)
    assert missed_by_peft(state_space(), sites(state_space())).startswith("PEFT puts no LoRA there")


def test_a_layer_that_peft_knows_by_another_name_is_missed():
    """PEFT renames the shared experts of Laguna in the file, and finds nothing under the new name."""
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp.shared_experts = nn.ModuleDict({"down_proj": nn.Linear(4, 32)})
    names = [f"model.layers.{i}.mlp.shared_experts.down_proj" for i in range(4)]
    assert missed_by_peft(model, names) == ""
    model.config.model_type = "laguna"
    assert "onto model.layers.0.mlp.shared_experts.down_proj" in missed_by_peft(model, names)


@pytest.mark.parametrize("maker", [shared_expert, state_space])
def test_saving_a_lora_that_peft_would_not_read_warns_and_bem_reads_it(maker, tmp_path, caplog):
    attached = probe.perturbed(bem.attach(maker(), "s0", rank=2))
    with caplog.at_level(logging.WARNING, "bem"):
        attached.save(tmp_path / "a")
    assert "bem.load reads it, PEFT itself does not: PEFT puts no LoRA" in caplog.text
    again = bem.load(maker(), tmp_path / "a")
    assert torch.equal(probe.logits(again.model, IDS), probe.logits(attached.model, IDS))


def test_saving_a_lora_that_peft_reads_does_not_warn(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "bem"):
        bem.attach(tiny_model("llama"), "s0", rank=2).save(tmp_path / "a")
    assert "PEFT" not in caplog.text
