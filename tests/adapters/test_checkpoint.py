"""A checkpoint is the adapter that was saved, on the base that it was made for, or it is refused."""

import json
import os
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import bem
from bem.adapters import checkpoint
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import tiny_model
from bem.adapters.version import Version, base_digest
from bem.errors import AttachError, BaseMismatch, CheckpointError
from tests.adapters.test_learning import train
from tests.conftest import make_llama
from tests.routing.mounted import mounted

SETTINGS = {
    "s0": {"rank_mlp": 3, "alpha": 5.0},
    "pt1": {},
    "v1": {"mask": "random", "trust_radius": 0.7},
    "v2": {},
    "v3": {"rank": 1},
    "v4": {"film_range": "wide"},
}


def saved(folder, variant="v1", model=None, **settings):
    attached = probe.perturbed(
        bem.attach(
            model or tiny_model("llama"),
            variant,
            **{"rank": 4, "chunk_size": 8, **SETTINGS[variant], **settings},
        )
    )
    attached.save(folder)
    return attached


def lora(model, **settings):
    config = dict(r=4, lora_alpha=3, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**config, **settings})).eval()
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    return wrapped


# --- the same adapter, however often ---------------------------------------------------------------


@pytest.mark.parametrize("variant", SETTINGS)
def test_saving_and_loading_changes_no_logit_and_no_version(variant, tmp_path):
    attached = saved(tmp_path / "0", variant)
    logits, version = probe.logits(attached.model, probe.token_ids()), attached.version
    for i in range(3):
        attached = bem.load(tiny_model("llama"), tmp_path / str(i))
        assert torch.equal(probe.logits(attached.model, probe.token_ids()), logits)
        assert attached.version == version
        attached.save(tmp_path / str(i + 1))


@pytest.mark.parametrize("variant", SETTINGS)
def test_a_way_through_peft_changes_no_logit_and_no_version(variant, tmp_path):
    attached = saved(tmp_path / "a", variant)
    logits, version = probe.logits(attached.model, probe.token_ids()), attached.version
    attached.model.save_pretrained(tmp_path / "b")
    for i, folder in enumerate(("a", "b")):
        wrapped = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / folder))
        assert torch.allclose(probe.logits(wrapped, probe.token_ids()), logits, atol=1e-5)
        wrapped.save_pretrained(tmp_path / f"c{i}")
        again = bem.load(tiny_model("llama"), tmp_path / f"c{i}")
        assert torch.equal(probe.logits(again.model, probe.token_ids()), logits)
        assert again.version == version


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 2},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"o_proj": 5}},
        {"rank_pattern": {r"layers\.[12]\.mlp\.down_proj": 3}, "use_rslora": True},
        {"layers_to_transform": [1, 3]},
    ],
)
def test_a_lora_of_others_keeps_its_scales_and_ranks(settings, tmp_path):
    wrapped = lora(tiny_model("llama"), **settings)
    logits = probe.logits(wrapped, probe.token_ids())
    wrapped.save_pretrained(tmp_path / "0")
    first = None
    for i in range(3):
        attached = bem.load(tiny_model("llama"), tmp_path / str(i))
        assert torch.allclose(probe.logits(attached.model, probe.token_ids()), logits, atol=1e-5)
        first = first or (attached.version, probe.logits(attached.model, probe.token_ids()))
        assert attached.version == first[0]
        assert torch.equal(probe.logits(attached.model, probe.token_ids()), first[1])
        attached.save(tmp_path / str(i + 1))


def test_an_s0_checkpoint_is_a_plain_lora_that_plain_peft_loads(tmp_path):
    attached = saved(tmp_path / "a", "s0")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["peft_type"] == "LORA"
    wrapped = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "a"))
    assert isinstance(wrapped.base_model, peft.LoraModel)
    assert torch.allclose(
        probe.logits(wrapped, probe.token_ids()),
        probe.logits(attached.model, probe.token_ids()),
        atol=1e-5,
    )


def test_a_checkpoint_of_trainer_loads(tmp_path):
    attached = bem.attach(tiny_model("llama"), "v1", rank=4, chunk_size=8)
    train(attached.model, tmp_path, save_strategy="steps", save_steps=3)
    attached.model.eval()
    again = bem.load(tiny_model("llama"), tmp_path / "checkpoint-3")
    assert torch.equal(
        probe.logits(again.model, probe.token_ids()),
        probe.logits(attached.model, probe.token_ids()),
    )
    assert again.version == attached.version


def test_a_peft_model_becomes_attached_and_is_saved_with_a_manifest(tmp_path):
    wrapped = peft.get_peft_model(
        tiny_model("llama"), bem.BemConfig("v1", rank=4, task_type="CAUSAL_LM"), "mine"
    ).eval()
    attached = probe.perturbed(bem.from_peft(wrapped))
    assert attached.config.variant == "v1" and attached.price().parameters > 0
    attached.save(tmp_path / "a")
    again = bem.load(tiny_model("llama"), tmp_path / "a")
    assert torch.equal(
        probe.logits(again.model, probe.token_ids()), probe.logits(wrapped, probe.token_ids())
    )
    assert again.version == attached.version
    assert attached.detach() is wrapped.base_model.model


def test_what_is_no_adapter_of_ours_does_not_become_attached():
    with pytest.raises(AttachError, match="is no PeftModel"):
        bem.from_peft(tiny_model("llama"))
    with pytest.raises(AttachError, match=r"is LORA, not BEM.*bem\.load"):
        bem.from_peft(lora(tiny_model("llama")))


# --- the same base ---------------------------------------------------------------------------------


def test_the_same_base_in_another_dtype_is_refused_with_what_to_do(tmp_path):
    saved(tmp_path / "a")
    with pytest.raises(
        BaseMismatch, match=r"in float32, which is loaded in bfloat16.*dtype='float32'"
    ):
        bem.load(tiny_model("llama").to(torch.bfloat16), tmp_path / "a")
    saved(tmp_path / "b", model=tiny_model("llama").to(torch.bfloat16))
    with pytest.raises(BaseMismatch, match=r"in bfloat16, which is loaded in float32"):
        bem.load(tiny_model("llama"), tmp_path / "b")
    rounded = tiny_model("llama").to(torch.bfloat16).float()  # the same numbers
    assert bem.load(rounded, tmp_path / "b").config.variant == "v1"


def test_other_weights_and_other_shapes_are_told_apart(tmp_path):
    saved(tmp_path / "a")
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight[0, 0] += 1
    with pytest.raises(BaseMismatch, match="the same layers with other weights"):
        bem.load(other, tmp_path / "a")
    with pytest.raises(BaseMismatch, match="other names or shapes"):
        bem.load(make_llama(), tmp_path / "a")
    assert not any("bem_" in n for n, _ in other.named_modules())


@pytest.mark.parametrize("variant", ["s0", "v1"])
def test_a_compiled_base_is_the_same_base(variant, tmp_path):
    attached = saved(tmp_path / "a", variant)
    logits = probe.logits(attached.model, probe.token_ids())
    compiled = torch.compile(tiny_model("llama"), backend="eager")
    again = bem.load(compiled, tmp_path / "a")
    assert torch.equal(probe.logits(again.model, probe.token_ids()), logits)
    again.save(tmp_path / "b")
    assert torch.equal(
        probe.logits(bem.load(tiny_model("llama"), tmp_path / "b").model, probe.token_ids()), logits
    )


def test_resized_embeddings_stay_out_of_the_checkpoint(tmp_path):
    def resized():
        model = make_llama()
        torch.manual_seed(0)
        model.resize_token_embeddings(model.config.vocab_size + 2)
        model.name_or_path = str(tmp_path / "base")
        return model

    make_llama().save_pretrained(tmp_path / "base")
    saved(tmp_path / "a", "s0", resized())
    tensors = checkpoint.read(tmp_path / "a").version.sites
    assert len(tensors) == 6
    mount = bem.mount(resized(), [tmp_path / "a"])
    assert mount.experts[0].name == "a"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", ["s0", "v1"])
def test_an_adapter_belongs_to_the_embeddings_that_it_was_trained_with(variant, tied, tmp_path):
    def resized(rows, seed=0):
        model = make_llama(tie_word_embeddings=tied)
        torch.manual_seed(seed)
        model.resize_token_embeddings(320 + rows)  # new rows are drawn
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        return model

    attached = saved(tmp_path, variant, resized(2))
    ids = torch.tensor([[5, 6, 320, 321, 7]])
    with torch.no_grad():
        logits = attached.model(ids).logits
        assert torch.equal(bem.load(resized(2), tmp_path).model(ids).logits, logits)
    assert logits.shape[-1] == 322
    for other in (make_llama(tie_word_embeddings=tied), resized(3)):
        with pytest.raises(BaseMismatch, match="other names or shapes"):
            bem.load(other, tmp_path)
    with pytest.raises(BaseMismatch, match="the same layers with other weights"):
        bem.load(resized(2, seed=1), tmp_path)
    attached.base.resize_token_embeddings(324)  # while it is attached
    attached.save(tmp_path / "later")
    with pytest.raises(BaseMismatch, match="other names or shapes"):
        bem.load(resized(2), tmp_path / "later")


def test_the_base_is_named_wherever_an_adapter_is_written(tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    static = saved(tmp_path / "a", "s0", base)
    static.save_lora(tmp_path / "b")
    static.detach()
    saved(tmp_path / "c", "v1", base)
    for folder in "abc":
        values = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert values["base_model_name_or_path"] == str(tmp_path / "base")
        assert str(tmp_path / "base") in (tmp_path / folder / "README.md").read_text()
        peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / folder))


# --- the same files --------------------------------------------------------------------------------


def test_the_manifest_holds_the_version_and_where_it_comes_from(tmp_path):
    attached = saved(tmp_path / "a")
    attached.save(tmp_path / "a", data_hash="d" * 64, parent="p" * 64, extra={"step": 3})
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["data"] == "d" * 64 and manifest["parent"] == "p" * 64
    assert manifest["extra"] == {"step": 3} and manifest["adapter"]["variant"] == "v1"
    assert Version.from_dict(manifest["version"]) == attached.version
    assert manifest["base"]["digest"] == base_digest(tiny_model("llama"))
    assert manifest["base"]["dtype"] == "float32"
    assert set(manifest["files"]) == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    saved(tmp_path / "a")
    os.remove(tmp_path / "a" / name)
    with pytest.raises(CheckpointError, match=name):
        bem.load(tiny_model("llama"), tmp_path / "a")


@pytest.mark.parametrize("variant", ["s0", "v1"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_changed_file_is_named(tmp_path, name, variant):
    saved(tmp_path / "a", variant)
    data = bytearray((tmp_path / "a" / name).read_bytes())
    data[-3] ^= 1
    (tmp_path / "a" / name).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=f"{name} was changed after saving"):
        bem.load(tiny_model("llama"), tmp_path / "a")


def test_a_manifest_of_another_adapter_is_refused(tmp_path):
    saved(tmp_path / "a", "v1")
    saved(tmp_path / "b", "v1", chunk_size=16)
    file = tmp_path / "a" / "manifest.json"
    values = json.loads(file.read_text())
    values["version"] = json.loads((tmp_path / "b" / "manifest.json").read_text())["version"]
    file.write_text(json.dumps(values))
    base = tiny_model("llama")
    with pytest.raises(CheckpointError, match="does not belong to these files"):
        bem.load(base, tmp_path / "a")
    assert not any("bem_" in n for n, _ in base.named_modules())


def test_an_older_format_is_refused_with_a_sentence(tmp_path):
    saved(tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
    with pytest.raises(CheckpointError, match="has format 1, this BEM reads 2: it was written by"):
        bem.load(tiny_model("llama"), tmp_path / "a")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 2, "files": {}}'])
def test_a_broken_manifest_is_a_checkpoint_error(tmp_path, content):
    saved(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError):
        bem.load(tiny_model("llama"), tmp_path / "a")


def test_a_router_is_told_from_an_adapter(tmp_path):
    mounted(tiny_model("llama")).save(tmp_path / "r")
    (tmp_path / "r" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"bem\.load_router"):
        bem.load(tiny_model("llama"), tmp_path / "r")


def test_an_edited_card_changes_nothing_and_is_kept(tmp_path):
    attached = saved(tmp_path / "a")
    card = tmp_path / "a" / "README.md"
    assert "import bem" in card.read_text()
    card.write_text("# Mine\nwhat it is for")
    assert bem.load(tiny_model("llama"), tmp_path / "a").version == attached.version
    attached.save(tmp_path / "a")
    assert card.read_text() == "# Mine\nwhat it is for"


@pytest.mark.parametrize("content", [{}, {"peft_type": "IA3"}, {"peft_type": "BEM", "rank": 2}])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        bem.load(tiny_model("llama"), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        bem.load(tiny_model("llama"), tmp_path)


# --- the same folder -------------------------------------------------------------------------------


def test_files_of_others_are_never_deleted(tmp_path):
    attached = saved(tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "b" / "inner").mkdir(parents=True)
    for folder, name in (("full", "thesis.txt"), ("a", "notes.txt"), ("b", "inner")):
        before = sorted(p.name for p in (tmp_path / folder).iterdir())
        with pytest.raises(CheckpointError, match=f"were not written here, as '{name}'"):
            attached.save(tmp_path / folder)
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == before


def test_the_working_directory_can_be_saved_in_again_and_again(tmp_path, monkeypatch):
    attached = saved(tmp_path / "a")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(3):
        attached.save(".")
        assert Path.cwd() == tmp_path / "here"
        assert bem.load(tiny_model("llama"), ".").version == attached.version
    (tmp_path / "here" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        attached.save(".")


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    attached = saved(tmp_path / "a")
    before = (tmp_path / "a" / "manifest.json").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(CheckpointError, match="No space left"):
        attached.save(tmp_path / "a", extra={"new": True})
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_changing_adapter_is_no_lora(tmp_path):
    with pytest.raises(AttachError, match="only s0 is a plain LoRA"):
        bem.attach(tiny_model("llama"), "v3", rank=1).save_lora(tmp_path / "a")


@pytest.mark.parametrize("manifest", ["{}", '{"kind": "web app"}', '{"files": {"notes.txt": "0"}}'])
def test_a_manifest_that_is_somebody_elses_makes_no_file_ours(tmp_path, manifest):
    attached = saved(tmp_path / "a")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text(manifest)
    (tmp_path / "app" / "README.md").write_text("theirs")
    with pytest.raises(CheckpointError, match=r"were not written here, as 'README\.md'"):
        attached.save(tmp_path / "app")
    assert (tmp_path / "app" / "README.md").read_text() == "theirs"


def test_a_file_that_was_added_to_the_manifest_is_not_deleted(tmp_path):
    attached = saved(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("x")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["files"]["notes.txt"] = "0" * 64
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"were not written here, as 'notes\.txt'"):
        attached.save(tmp_path / "a")


@pytest.mark.parametrize("files", [None, [], "x", {"a": 1}, {"../../etc/passwd": "0" * 64}])
def test_a_manifest_whose_list_of_files_cannot_be_used_is_refused(tmp_path, files):
    saved(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
    with pytest.raises(CheckpointError, match="manifest lists"):
        bem.load(tiny_model("llama"), tmp_path / "a")


@pytest.mark.parametrize("folder", ["/", "a\0b", "x" * 300])
def test_a_folder_that_cannot_be_is_refused(tmp_path, monkeypatch, folder):
    attached = saved(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"could not write|were not written here"):
        attached.save(folder)
