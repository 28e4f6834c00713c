"""What a BemConfig asks for is done, or refused with the reason; none of it is dropped."""

import json

import peft
import pytest
import torch

import bem
from bem import BemConfig
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import tiny_model
from bem.errors import AttachError, CheckpointError, ConfigError
from tests.conftest import make_llama
from tests.routing.mounted import mounted


def wrap(model=None, **settings):
    config = BemConfig(**{"rank": 2, "task_type": "CAUSAL_LM", **settings})
    return peft.get_peft_model(model or tiny_model("llama"), config).eval()


def sites(model):
    return sorted(bem.from_peft(model).sizes())


# --- which sites -----------------------------------------------------------------------------------


def test_target_modules_choose_among_the_sites():
    names = sites(wrap(target_modules=["o_proj"]))
    assert names == [f"model.layers.{i}.self_attn.o_proj" for i in (1, 2, 3)]
    names = sites(wrap(target_modules=["layers.2.mlp.down_proj", "layers.1.self_attn.o_proj"]))
    assert names == ["model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj"]
    assert sites(wrap(target_modules=r".*\.3\.mlp\..*")) == ["model.layers.3.mlp.down_proj"]


def test_exclude_modules_leave_sites_out_without_a_warning(recwarn):
    names = sites(wrap(exclude_modules=["down_proj"]))
    assert names == [f"model.layers.{i}.self_attn.o_proj" for i in (1, 2, 3)]
    assert not [w for w in recwarn if "exclude_modules" in str(w.message)]


def test_layers_to_transform_choose_layers():
    names = sites(wrap(layers_to_transform=[1, 3], exclude_modules=["o_proj"]))
    assert names == ["model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"]
    assert len(sites(wrap(layers_to_transform=2))) == 2


def test_v1_keeps_its_controller_when_its_lowest_sites_are_left_out():
    model = wrap(variant="v1", layers_to_transform=[3], chunk_size=8)
    before = probe.logits(model, probe.token_ids())
    probe.perturbed(bem.from_peft(model))
    assert not torch.allclose(probe.logits(model, probe.token_ids()), before, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_modules": ["o_proj", "up_proj"]}, "names 'up_proj', where this adapter has no"),
        ({"target_modules": ["q_proj", "o_proj"]}, "q_proj: a query, key or value"),
        ({"target_modules": "all-linear"}, "all-linear"),
        ({"target_modules": ".*nothing.*"}, "nothing"),
        ({"target_modules": ["layers.0.mlp.down_proj"]}, "needs a lower router_layer"),
        ({"variant": "pt1", "target_modules": ["down_proj"]}, "Its sites are: o_proj"),
        ({"exclude_modules": ["lm_head"]}, "names 'lm_head', where this adapter has no site"),
        ({"exclude_modules": ["o_proj", "down_proj"]}, "leaves no site to adapt"),
        ({"layers_to_transform": [0]}, "layer 0, where this adapter has no site"),
        ({"layers_to_transform": [9]}, "layers 1 to 3"),
        ({"modules_to_save": ["lm_head"]}, "BEM trains adapters alone"),
    ],
)
def test_what_cannot_be_honoured_is_refused(settings, reason):
    model = tiny_model("llama")
    with pytest.raises(AttachError, match=reason):
        wrap(model, **settings)
    assert not any("bem_" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("knob", ["layers_pattern", "rank_pattern", "bias", "lora_alpha"])
def test_a_knob_of_another_method_is_refused(knob):
    with pytest.raises(ConfigError, match=f"unknown key '{knob}'"):
        BemConfig("s0", **{knob: ["layers"]})


def test_a_knob_of_another_variant_says_whose_it_is():
    with pytest.raises(ConfigError, match="'mask' is a knob of v1, not of pt1"):
        BemConfig("pt1", mask="random")


@pytest.mark.parametrize("variant", ["s0", "v1", "v3", "v4"])
def test_many_sites_are_adapted_saved_and_loaded(variant, tmp_path):
    """From 20 target modules on PEFT shortens their names to suffixes."""
    deep = {"num_hidden_layers": 24}
    attached = probe.perturbed(bem.attach(make_llama(**deep), variant, rank=2, router_layer=0))
    assert len(attached.sizes()) >= 24
    logits = probe.logits(attached.model, probe.token_ids())
    attached.model.save_pretrained(tmp_path / "peft")
    attached.save(tmp_path / "ours")
    for folder in ("peft", "ours"):
        again = bem.load(make_llama(**deep), tmp_path / folder)
        assert torch.equal(probe.logits(again.model, probe.token_ids()), logits)
        assert again.version == attached.version


# --- files -----------------------------------------------------------------------------------------


def test_what_is_saved_holds_the_knobs_of_its_variant_alone_and_every_size(tmp_path):
    wrap(variant="v3", spectral_cap=None).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["spectral_cap"] is None and "mask" not in values and "d_control" not in values
    assert values["peft_type"] == "BEM" and values["variant"] == "v3" and values["rank"] == 2
    assert values["site_sizes"] == {
        f"model.layers.{i}.mlp.down_proj": {"rank": 2, "scale": 2.0} for i in (1, 2, 3)
    }
    assert BemConfig.from_pretrained(str(tmp_path)).adapter_config().spectral_cap is None


def test_a_choice_of_sites_survives_saving(tmp_path):
    model = wrap(variant="v1", target_modules=["o_proj"], layers_to_transform=[2, 3])
    probe.perturbed(bem.from_peft(model))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert sites(loaded) == sites(model)
    assert torch.equal(
        probe.logits(loaded, probe.token_ids()), probe.logits(model, probe.token_ids())
    )


def test_a_scale_that_was_changed_after_attaching_is_saved(tmp_path):
    model = wrap(variant="v3")
    attached = probe.perturbed(bem.from_peft(model))
    attached.modules()[1].scale = 0.3
    logits = probe.logits(model, probe.token_ids())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert torch.equal(probe.logits(loaded, probe.token_ids()), logits)


def test_sites_of_another_model_are_refused(tmp_path):
    wrap(make_llama(num_hidden_layers=8), variant="v1").save_pretrained(tmp_path)
    with pytest.raises(AttachError, match="made for another one"):
        peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))


def test_saving_asks_no_hub_and_takes_no_embeddings(tmp_path, monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", asked)
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(base.config.vocab_size + 3)
    model = wrap(base, variant="v1")
    config = model.peft_config["default"]
    config.base_model_name_or_path = "some/base"
    for _ in range(2):
        model.save_pretrained(tmp_path / "peft")
        assert config.base_model_name_or_path == "some/base"
    from safetensors import safe_open

    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", "pt") as file:
        assert all(".bem_" in key for key in file.keys())  # noqa: SIM118 - no mapping
    saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "some/base"


def test_the_card_that_peft_writes_says_how_to_load(tmp_path):
    model = wrap(variant="v1")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import bem") == 1 and "library_name: peft" in card


def test_mounted_experts_are_not_saved_by_peft(tmp_path):
    with pytest.raises(CheckpointError, match=r"Mounted\.save"):
        mounted(tiny_model("llama")).model.save_pretrained(tmp_path)


def test_configs_are_equal_when_they_ask_for_the_same():
    assert BemConfig("v1", rank=4) == BemConfig("v1", rank=4, mask="learned")
    assert BemConfig("v1", rank=4) != BemConfig("v1", rank=5)
    assert "variant='v1'" in repr(BemConfig("v1"))
