import pytest
import torch

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import tiny_model
from bem.config import AdapterConfig
from bem.errors import AttachError, ConfigError


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
    attached = probe.perturbed(bem.attach(tiny_model("llama"), "v1", rank=4))
    wanted = probe.logits(attached.model, probe.token_ids())
    state = {n: t.clone() for n, t in attached.state_dict().items()}
    other = bem.attach(tiny_model("llama"), "v1", rank=4)
    other.model.eval()
    other.load_state_dict(state)
    assert torch.equal(probe.logits(other.model, probe.token_ids()), wanted)
    with pytest.raises(AttachError, match="do not fit"):
        other.load_state_dict({})


def test_a_loaded_checkpoint_is_frozen_unless_it_shall_train(tmp_path):
    bem.attach(tiny_model("llama"), "v1", rank=4).save(tmp_path / "a")
    assert not any(
        p.requires_grad for p in bem.load(tiny_model("llama"), tmp_path / "a").parameters()
    )
    trainable = bem.load(tiny_model("llama"), tmp_path / "a", trainable=True)
    assert all(p.requires_grad for p in trainable.parameters())


def test_attaching_to_a_compiled_model_adapts_the_model_inside():
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="eager")
    attached = probe.perturbed(bem.attach(compiled, "v1", rank=4, chunk_size=8))
    plain = probe.perturbed(bem.attach(tiny_model("llama"), "v1", rank=4, chunk_size=8))
    assert torch.equal(
        probe.logits(attached.model, probe.token_ids()),
        probe.logits(plain.model, probe.token_ids()),
    )
    assert attached.detach() is model


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_adapter_per_row_is_refused_unless_it_is_the_one_that_acts(call):
    attached = bem.attach(tiny_model("llama"), "v1", rank=4, chunk_size=8)
    attached.base.generation_config.pad_token_id = 0
    run = attached.model if call == "forward" else attached.model.generate
    for model in (attached.model, attached.base):
        run = model if call == "forward" else model.generate
        with pytest.raises(AttachError, match=r"one BEM adapter is active.*bem\.mount"):
            run(input_ids=probe.token_ids(), adapter_names=["__base__", "default"])
    attached.model(input_ids=probe.token_ids(), adapter_names=["default", "default"])


def test_what_is_no_model_is_refused():
    with pytest.raises(AttachError, match="str is no model"):
        bem.attach("bem-tiny", "s0")
