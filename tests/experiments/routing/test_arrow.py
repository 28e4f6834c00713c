"""Arrow takes the experts whose main direction is nearest to the token, as its paper says."""

import pytest
import torch

from bem.config import TrainingConfig
from bem.errors import TrainingError
from bem.experiments.routing.arrow import arrow
from bem.training.fit import fit
from tests.experiments.routing.lora_experts import rows, updates


def test_arrow_adds_the_expert_whose_main_direction_is_nearest(micro_llama, folders):
    site = "model.layers.3.mlp.down_proj"
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(1))
    layer = micro_llama.get_submodule(site)
    with torch.no_grad():
        plain = layer(x)
        experts = [updates(i)[site] for i in range(2)]
        main = torch.stack([torch.linalg.svd(e.u @ e.v).Vh[0] for e in experts])
        chosen = (x @ main.T).abs().argmax(-1)
        deltas = torch.stack([x @ (e.u @ e.v).T for e in experts])
        expected = plain + torch.where(chosen[..., None] == 0, deltas[0], deltas[1])
        arrow(micro_llama, folders)
        got = micro_llama.get_submodule(site)(x)
    margins = (x @ main.T).abs().diff(dim=-1).abs()[..., 0]
    clear = margins > 0.1  # PEFT's power iteration stops after 15 rounds
    assert {0, 1} == set(chosen[clear].tolist())
    assert torch.allclose(got[clear], expected[clear], atol=1e-5)


def test_arrow_with_all_experts_needs_no_choice_and_a_high_temperature_averages(
    micro_llama, folders
):
    site = "model.layers.1.self_attn.o_proj"
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = micro_llama.get_submodule(site)(x)
        mean = sum(e.u @ e.v for e in (updates(i)[site] for i in range(2))) / 2
        arrow(micro_llama, folders, top_k=2, temperature=1e6)
        got = micro_llama.get_submodule(site)(x)
    assert torch.allclose(got, plain + x @ mean.T, atol=1e-4)


def test_arrow_has_nothing_to_train(micro_llama, folders, tokenizer, tmp_path):
    peer = arrow(micro_llama, folders)
    assert peer.parameters() == [] and not any(p.requires_grad for p in peer.model.parameters())
    with pytest.raises(TrainingError, match="no trainable parameters"):
        fit(peer, tokenizer, rows(), TrainingConfig(steps=1), tmp_path / "run", 0)
