"""One digest names what acts; a base is hashed once."""

import copy
import json
import pickle

import peft
import pytest
import torch
from torch import nn

import bem
from bem.adapters import checks_probe as probe
from bem.adapters import version as module
from bem.adapters.checks_models import tiny_model
from bem.adapters.version import SiteSize, Version, base_digest, base_identity
from bem.errors import CheckpointError
from bem.variants.digest import weights_digest

PARTS = dict(
    base="b",
    config={"variant": "s0"},
    sites={"a": SiteSize(4, 2.0)},
    weights={"adapter": "w"},
)


@pytest.fixture
def hashed(monkeypatch):
    """Counts how often weights were really hashed."""
    calls = []

    def counted(named):
        calls.append(len(named))
        return weights_digest(named)

    monkeypatch.setattr(module, "weights_digest", counted)
    return calls


@pytest.mark.parametrize(
    "change",
    [
        {"base": "c"},
        {"config": {"variant": "v3"}},
        {"sites": {"a": SiteSize(4, 2.5)}},
        {"sites": {"a": SiteSize(5, 2.0)}},
        {"sites": {"b": SiteSize(4, 2.0)}},
        {"weights": {"adapter": "x"}},
        {"weights": {"adapter": "w", "router": "r"}},
    ],
)
def test_whatever_acts_is_part_of_the_digest(change):
    assert Version(**{**PARTS, **change}) != Version(**PARTS)


def test_a_version_survives_json_pickle_and_copy():
    one = Version(**PARTS)
    back = Version.from_dict(json.loads(json.dumps(one.to_dict())))
    for other in (back, pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert other == one and hash(other) == hash(one) and other.to_dict() == one.to_dict()


def test_a_version_cannot_be_changed():
    one = Version(**PARTS)
    with pytest.raises(AttributeError):
        one.base = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        one.weights["adapter"] = "other"  # type: ignore[index]


def test_a_version_whose_parts_were_changed_is_refused():
    values = Version(**PARTS).to_dict()
    values["sites"]["a"]["scale"] = 3.0
    with pytest.raises(CheckpointError, match="changed after it was written"):
        Version.from_dict(values)
    with pytest.raises(CheckpointError, match="this is no version"):
        Version.from_dict({"base": "b"})


def test_the_base_digest_knows_one_changed_weight_and_one_buffer():
    model = tiny_model("llama")
    model.register_buffer("correction", torch.zeros(3))
    before = base_digest(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    after = base_digest(model)
    model.correction += 1
    assert len({before, after, base_digest(model)}) == 3


def test_the_base_digest_is_that_of_another_load():
    assert base_digest(tiny_model("llama")) == base_digest(tiny_model("llama"))


@pytest.mark.parametrize("variant", ["s0", "v1", "v4"])
def test_the_base_digest_does_not_see_what_is_attached(variant):
    model = tiny_model("llama")
    before = base_digest(tiny_model("llama"))
    attached = probe.perturbed(bem.attach(model, variant, rank=4))
    assert base_digest(attached.model) == base_digest(model) == before
    assert base_digest(attached.detach()) == before


def test_the_base_digest_does_not_see_peft_torch_compile_or_saved_modules():
    before = base_digest(tiny_model("llama"))
    lora = peft.LoraConfig(
        target_modules=["o_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(tiny_model("llama"), lora)
    compiled = torch.compile(tiny_model("llama"), backend="eager")
    blocks = tiny_model("llama")
    blocks.model.layers[1] = torch.compile(blocks.model.layers[1], backend="eager")
    assert [base_digest(m) for m in (wrapped, compiled, blocks)] == [before] * 3


def test_tied_weights_are_one_weight():
    tied, free = nn.Linear(3, 3), nn.Linear(3, 3)
    two = nn.ModuleDict({"a": tied, "b": free})
    before = base_digest(two)
    free.weight = tied.weight
    assert base_digest(two) != before


def test_a_base_is_hashed_once_until_a_weight_changes(hashed):
    model = tiny_model("llama")
    for _ in range(3):
        base_digest(model)
    attached = bem.attach(model, "v1", rank=4)
    base_digest(attached.model)
    attached.detach()
    base_digest(model)
    assert len(hashed) == 1
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    base_digest(model)
    assert len(hashed) == 2
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    base_digest(model)
    assert len(hashed) == 3


def test_values_count_and_not_the_dtype_that_holds_them():
    rounded = tiny_model("llama").to(torch.bfloat16)
    again = copy.deepcopy(rounded).float()
    assert base_digest(rounded) == base_digest(again) != base_digest(tiny_model("llama"))
    assert (base_identity(rounded).dtype, base_identity(again).dtype) == ("bfloat16", "float32")
    assert base_identity(rounded).shapes == base_identity(tiny_model("llama")).shapes


def test_an_adapters_version_is_kept_until_a_weight_or_a_scale_changes(hashed):
    attached = probe.perturbed(bem.attach(tiny_model("llama"), "s0", rank=4))
    first = attached.version
    assert attached.version is first and len(hashed) == 2  # the base and the adapter
    with torch.no_grad():
        attached.parameters()[0][0, 0] += 1
    second = attached.version
    attached.parameters()[1].data.mul_(2)  # torch counts no writes through .data
    third = attached.version
    attached.modules()[0].scale = 0.5
    assert len({first, second, third, attached.version}) == 4


def test_settings_that_only_shape_the_training_are_not_part_of_a_version():
    one = bem.attach(tiny_model("llama"), "v1", rank=4, seed=1, mask="fixed")
    other = bem.attach(
        tiny_model("llama"), "v1", rank=4, seed=2, mask="fixed", decorrelation=0.3, router_layer=1
    )
    other.load_state_dict(one.state_dict())
    assert other.version == one.version
    third = bem.attach(tiny_model("llama"), "v1", rank=4, mask="fixed", chunk_size=8)
    third.load_state_dict(one.state_dict())
    assert third.version != one.version


def test_a_version_names_no_adapter():
    one = probe.perturbed(bem.attach(tiny_model("llama"), "v1", rank=4))
    wrapped = peft.get_peft_model(tiny_model("llama"), bem.BemConfig("v1", rank=4), "mine")
    other = bem.from_peft(wrapped)
    other.load_state_dict(
        {n.replace(".default.", ".mine."): t for n, t in one.state_dict().items()}
    )
    assert other.version == one.version
    assert torch.equal(
        probe.logits(wrapped.eval(), probe.token_ids()), probe.logits(one.model, probe.token_ids())
    )
