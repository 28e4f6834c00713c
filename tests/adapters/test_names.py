"""Names of modules are those before attaching; names of experts are safe as folders."""

import pytest
import torch

import bem
from bem.adapters.checks_models import tiny_model
from bem.adapters.names import check_name, clean_name, innermost, name_of_base, unwrapped
from bem.errors import AttachError


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("model.layers.0.mlp", "model.layers.0.mlp"),
        ("_orig_mod.model.layers.0._orig_mod.mlp.base_layer", "model.layers.0.mlp"),
        ("lm_head.original_module.weight", "lm_head.weight"),
        ("model.base_layers.0", "model.base_layers.0"),
    ],
)
def test_a_clean_name_has_no_wrappers_in_it(name, clean):
    assert clean_name(name) == clean


@pytest.mark.parametrize("name", ["sql", "a-peft.lora_2", "résumé", "two words", "x", "v1+2@3"])
def test_a_plain_name_is_taken(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "../../evil",
        "/etc",
        "a/b",
        "a\\b",
        "..",
        ".",
        ".hidden",
        "",
        " a",
        "a ",
        "a\n",
        "a\0b",
        "a" * 129,
    ],
)
def test_a_name_that_leaves_its_folder_is_refused(name):
    with pytest.raises(AttachError, match="becomes the name of a folder"):
        check_name(name)


def test_the_innermost_model_is_below_compile_and_peft():
    model = tiny_model("llama")
    attached = bem.attach(torch.compile(model, backend="eager"), "s0", rank=2)
    assert innermost(torch.compile(attached.model, backend="eager")) is model
    assert unwrapped(attached.model) is attached.model


def test_a_base_without_a_name_has_none():
    model = tiny_model("llama")
    assert name_of_base(model) is None
    model.name_or_path = "some/base"
    assert name_of_base(bem.attach(model, "s0", rank=2).model) == "some/base"
