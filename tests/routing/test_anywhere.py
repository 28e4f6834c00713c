"""Experts that others have trained, on whatever linear layers of the decoder blocks."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import bem
from bem.adapters.checks_models import ARCHITECTURES, tiny_model
from bem.adapters.sites import find_linears
from bem.errors import CheckpointError
from bem.experts.expert import Update, from_updates
from bem.routing.checks import check_router
from tests.routing.mounted import FREE

WHOLE = ("llama", "gpt2", "phi3", "falcon")  # split, transposed and fused projections
CACHED = ["equal_through_the_cache", "equal_in_a_batch", "equal_under_beams"]
KINDS = {
    "a": dict(r=4, lora_alpha=8, target_modules="all-linear"),
    "b": dict(r=2, lora_alpha=3, target_modules="all-linear", use_rslora=True),
}


def everywhere(model, name, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    updates = {
        site.name: Update(0.05 * draw(site.d_out, rank), draw(rank, site.d_in) / site.d_in**0.5)
        for site in find_linears(model).found
    }
    return from_updates(name, updates, "test")


def mounted_everywhere(model):
    ranks = {"a": 4, "b": 4, "c": 2}
    experts = [everywhere(model, name, r, i) for i, (name, r) in enumerate(ranks.items())]
    made = bem.mount(model, experts, **FREE)
    made.router.trained = True
    return made


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_contract_holds_wherever_experts_act(arch):
    checks = None if arch in WHOLE else CACHED
    check_router(mounted_everywhere, [arch], checks).raise_if_failed()


@pytest.fixture(params=["llama", "gpt2", "phi3", "gpt_neox"])
def plain(request, tmp_path):
    """(architecture, folder, name -> PEFT's model) of two LoRAs made with plain PEFT."""
    models = {}
    for seed, (name, settings) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        model = get_peft_model(
            tiny_model(request.param), LoraConfig(task_type="CAUSAL_LM", **settings)
        )
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(tmp_path / name)
        models[name] = model.eval()
    return request.param, tmp_path, models


@torch.no_grad()
def test_routed_by_hand_they_give_the_logits_of_plain_peft(plain):
    arch, folder, models = plain
    mounted = bem.mount(tiny_model(arch), [folder / "a", folder / "b"], chunk_size=8)
    assert mounted.router_config.router_layer == 0
    ids = torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(0))
    route = torch.tensor([1, 2, 0])[:, None].expand_as(ids)
    logits = mounted.model(ids, route=route).logits
    for row, name in enumerate("ab"):
        assert torch.allclose(logits[row], models[name](ids[row : row + 1]).logits[0], atol=2e-5)
    assert torch.allclose(logits[2], tiny_model(arch)(ids[2:]).logits[0], atol=2e-5)
    # turn by turn: what was read under one expert stays read under it
    turns = torch.cat([torch.full((3, 8), 1), torch.full((3, 16), 2)], 1)
    switched = mounted.model(ids, route=turns).logits
    first = mounted.model(ids[:, :8], route=turns[:, :8]).logits
    assert torch.allclose(switched[:, :8], first, atol=2e-5)
    out = mounted.model.generate(ids, route=turns, max_new_tokens=6, do_sample=False)
    assert out.shape == (3, 30)


@torch.no_grad()
def test_saved_and_loaded_in_plain_peft_they_are_what_they_were(plain, tmp_path):
    arch, folder, models = plain
    mounted = bem.mount(tiny_model(arch), [folder / "a", folder / "b"])
    mounted.save(tmp_path / "routed")
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    for name in "ab":
        again = PeftModel.from_pretrained(tiny_model(arch), tmp_path / "routed" / "experts" / name)
        assert torch.allclose(again(ids).logits, models[name](ids).logits, atol=2e-5)
    loaded = bem.load_router(tiny_model(arch), tmp_path / "routed")
    route = torch.ones_like(ids)
    assert torch.equal(
        loaded.model(ids, route=route).logits, mounted.model(ids, route=route).logits
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "Train it without output head",
        ),
        (
            {"target_modules": ["q_proj"], "use_dora": True},
            "use_dora is not a plain low-rank update",
        ),
        ({"target_modules": ["q_proj"], "bias": "all"}, "trains biases of the base"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "modules_to_save is not a plain low-rank update",
        ),
    ],
)
def test_what_is_left_is_refused_with_the_reason(settings, reason, tmp_path):
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    model.save_pretrained(tmp_path / "x")
    with pytest.raises(CheckpointError, match=reason):
        bem.mount(tiny_model("llama"), [tmp_path / "x"])
