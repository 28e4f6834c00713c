import pytest
from torch import nn

from bem.adapters.checks_models import ARCHITECTURES, tiny_model
from bem.adapters.sites import ATTN_OUT, MLP_DOWN, find_sites
from bem.errors import AttachError

EXPECTED = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_sites_of_every_block_are_found(architecture):
    sites = find_sites(tiny_model(architecture))
    layers = 16 if architecture == "llama-16" else 4
    assert [(s.layer, s.role) for s in sites.found] == [
        (i, r) for i in range(layers) for r in (ATTN_OUT, MLP_DOWN)
    ]
    assert sites.n_heads == 4 and sites.d_model == 32
    assert all(s.d_out == 32 for s in sites.found)
    for site in sites.found:
        wanted = EXPECTED.get(architecture, EXPECTED["llama"])
        assert site.name.endswith(wanted[site.role == MLP_DOWN])


def test_unknown_names_are_found_by_what_they_do():
    model = tiny_model("llama")
    for block in model.model.layers:
        block.self_attn.project_back, block.mlp.shrink = block.self_attn.o_proj, block.mlp.down_proj
        del block.self_attn.o_proj, block.mlp.down_proj
    names = [s.name for s in find_sites(model).found]
    assert names[:2] == ["model.layers.0.self_attn.project_back", "model.layers.0.mlp.shrink"]


def test_sites_can_be_named_by_glob_or_regex():
    model = tiny_model("llama")
    sites = find_sites(
        model,
        {"attn_out": "model.layers.[13].self_attn.o_proj", "mlp_down": r"re:.*\.3\.mlp\.down_proj"},
    )
    assert [s.name for s in sites.found if s.role == ATTN_OUT] == [
        "model.layers.1.self_attn.o_proj",
        "model.layers.3.self_attn.o_proj",
    ]
    assert [s.name for s in sites.found if s.role == MLP_DOWN] == ["model.layers.3.mlp.down_proj"]


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_queries_keys_and_values_are_refused(name):
    with pytest.raises(AttachError, match=f"{name} is a query, key or value"):
        find_sites(tiny_model("llama"), {"attn_out": f"*.self_attn.{name}"})


def test_a_fused_qkv_projection_is_refused():
    with pytest.raises(AttachError, match="c_attn is a query, key or value"):
        find_sites(tiny_model("gpt2"), {"attn_out": "*.attn.c_attn"})


def test_an_unknown_role_is_refused():
    with pytest.raises(AttachError, match="'mlp_up'"):
        find_sites(tiny_model("llama"), {"mlp_up": "*"})


def test_a_model_without_blocks_is_refused():
    with pytest.raises(AttachError, match="no list of decoder blocks"):
        find_sites(nn.Sequential(nn.Linear(2, 2)))


def test_a_mixture_of_experts_asks_which_expert():
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp = nn.ModuleDict(
            {
                "a": nn.ModuleDict({"down_proj": nn.Linear(4, 32)}),
                "b": nn.ModuleDict({"down_proj": nn.Linear(4, 32)}),
            }
        )
    with pytest.raises(AttachError, match="several candidates for mlp_down"):
        find_sites(model)


def test_the_way_back_from_another_sequence_is_no_site():
    model = tiny_model("llama")
    for block in model.model.layers:
        block.encoder_attn = nn.ModuleDict({"out_proj": nn.Linear(32, 32)})
    names = [s.name for s in find_sites(model).above(3)]
    assert names == ["model.layers.3.self_attn.o_proj", "model.layers.3.mlp.down_proj"]


def test_a_block_that_reads_another_sequence_alone_has_no_site():
    model = tiny_model("llama")
    block = model.model.layers[2]
    block.cross_attn = block.self_attn
    del block.self_attn
    assert {s.layer for s in find_sites(model).found} == {0, 1, 3}


@pytest.mark.parametrize("beside", ["input_layernorm", "gate", "router_mlp"])
def test_a_small_mlp_inside_a_norm_or_a_router_is_no_site(beside):
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp.add_module(beside, nn.ModuleDict({"fc2": nn.Linear(4, 32)}))
    names = [s.name for s in find_sites(model).found if s.role == MLP_DOWN]
    assert names == [f"model.layers.{i}.mlp.down_proj" for i in range(4)]


@pytest.mark.parametrize("tower", ["vision_tower", "audio_encoder", "visual"])
def test_the_blocks_are_those_that_read_text(tower):
    model = tiny_model("llama")
    text, other = model.model, tiny_model("llama").model
    model.model = nn.ModuleDict({tower: other, "language_model": text})
    assert find_sites(model).blocks[0] == "model.language_model.layers.0"
