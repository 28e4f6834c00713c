import json
import os

import pytest
import torch

import bem
from bem.adapters.checks import _ids, _logits, _perturbed
from bem.adapters.checks_models import tiny_model
from bem.adapters.sites import base_hash
from bem.config import AdapterConfig
from bem.errors import AttachError, BaseMismatch, CheckpointError, ConfigError


def test_an_unknown_variant_names_the_known_ones():
    with pytest.raises(AttachError, match=r"unknown variant 'v9'.*s0, pt1, v1, v2, v3, v4"):
        bem.attach(tiny_model("llama"), "v9")


def test_a_misspelt_setting_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown key 'rnak'\. Did you mean 'rank'"):
        bem.attach(tiny_model("llama"), "s0", rnak=8)


def test_a_config_attaches_what_it_says():
    attached = bem.attach(tiny_model("llama"), AdapterConfig(variant="v1", rank=4), rank_mlp=2)
    assert attached.config.rank == 4 and attached.config.rank_mlp == 2


def test_attaching_twice_is_refused():
    attached = bem.attach(tiny_model("llama"), "s0", rank=2)
    with pytest.raises(AttachError, match="already carries"):
        bem.attach(attached.base, "v1")


def test_sites_below_the_router_layer_stay_frozen():
    attached = bem.attach(tiny_model("llama"), "v1", rank=2, router_layer=2)
    assert {int(n.split(".")[2]) for n, _ in attached.named_parameters()} == {2, 3}


def test_a_router_layer_outside_the_model_is_refused():
    with pytest.raises(AttachError, match=r"router_layer 4 must lie in 0..3"):
        bem.attach(tiny_model("llama"), "v1", router_layer=4)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    weights = [
        bem.attach(tiny_model("llama"), "v1", rank=4, seed=seed).state_dict() for seed in (1, 1, 2)
    ]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert any(not torch.equal(weights[0][n], weights[2][n]) for n in weights[0])


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(11)
    wanted = torch.rand(1)
    torch.manual_seed(11)
    model = tiny_model("llama")
    bem.attach(model, "v1", rank=4, mask="random")
    assert torch.equal(torch.rand(1), wanted)


def test_state_goes_out_and_in_again():
    attached = _perturbed(bem.attach(tiny_model("llama"), "v1", rank=4))
    wanted = _logits(attached.model, _ids())
    state = {n: t.clone() for n, t in attached.state_dict().items()}
    other = bem.attach(tiny_model("llama"), "v1", rank=4)
    other.model.eval()
    other.load_state_dict(state)
    assert torch.equal(_logits(other.model, _ids()), wanted)
    with pytest.raises(AttachError, match="do not fit"):
        other.load_state_dict({})


def test_another_base_is_refused(tmp_path):
    bem.attach(tiny_model("llama"), "v1", rank=4).save(tmp_path / "a")
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight[0, 0] += 1
    with pytest.raises(BaseMismatch, match="made for a base with hash"):
        bem.load(other, tmp_path / "a")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    bem.attach(tiny_model("llama"), "v1", rank=4).save(tmp_path / "a")
    os.remove(tmp_path / "a" / name)
    with pytest.raises(CheckpointError, match=name):
        bem.load(tiny_model("llama"), tmp_path / "a")


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    bem.attach(tiny_model("llama"), "v1", rank=4).save(tmp_path / "a")
    os.remove(tmp_path / "a" / "manifest.json")
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        bem.load(tiny_model("llama"), tmp_path / "a")


def test_the_manifest_tells_where_a_checkpoint_comes_from(tmp_path):
    attached = bem.attach(tiny_model("llama"), "v1", rank=4)
    attached.save(tmp_path / "a", data_hash="d" * 64, parent="p" * 64, extra={"step": 3})
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["data"] == "d" * 64 and manifest["parent"] == "p" * 64
    assert manifest["extra"] == {"step": 3} and manifest["adapter"]["variant"] == "v1"
    assert manifest["base"] == base_hash(tiny_model("llama"))
    assert set(manifest["files"]) == {p.name for p in (tmp_path / "a").iterdir()} - {
        "manifest.json"
    }


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    attached = bem.attach(tiny_model("llama"), "v1", rank=4)
    attached.save(tmp_path / "a")
    before = (tmp_path / "a" / "manifest.json").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(attached.model, "save_pretrained", full)
    with pytest.raises(CheckpointError, match="No space left"):
        attached.save(tmp_path / "a")
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_loaded_checkpoint_is_frozen_unless_it_shall_train(tmp_path):
    bem.attach(tiny_model("llama"), "v1", rank=4).save(tmp_path / "a")
    assert not any(
        p.requires_grad for p in bem.load(tiny_model("llama"), tmp_path / "a").parameters()
    )
    trainable = bem.load(tiny_model("llama"), tmp_path / "a", trainable=True)
    assert all(p.requires_grad for p in trainable.parameters())
