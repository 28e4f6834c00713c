"""A refused attach leaves the model as it was, for whatever reason it was refused."""

import peft
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

import bem
from bem.adapters import checks_probe as probe
from bem.adapters import peft_method
from bem.adapters.checks_models import tiny_model
from bem.adapters.rollback import rolled_back
from bem.errors import AttachError
from tests.routing.mounted import expert


def bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4)).eval()


def look(model):
    """Everything that attaching might leave behind."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    flags = [p.requires_grad for p in model.parameters()]
    return [n for n, _ in model.named_modules()], hooks, flags, sorted(model.__dict__)


def test_a_refused_variant_leaves_nothing_and_the_next_one_works():
    model = bloom()
    before, logits = look(model), probe.logits(model, probe.token_ids())
    with pytest.raises(AttachError, match="ALiBi"):
        bem.attach(model, "v2", rank=4)
    assert look(model) == before
    assert torch.equal(probe.logits(model, probe.token_ids()), logits)
    attached = probe.perturbed(bem.attach(model, "v4", rank=4))
    assert not torch.equal(probe.logits(attached.model, probe.token_ids()), logits)


def test_a_failure_in_the_middle_of_peft_leaves_nothing(monkeypatch):
    model = tiny_model("llama")
    before, calls = look(model), []

    def fails(self, name, parts):
        calls.append(name)
        if len(calls) == 4:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(peft_method.BemSite, "add", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        bem.attach(model, "v1", rank=4)
    assert look(model) == before
    monkeypatch.undo()
    assert bem.attach(model, "v1", rank=4).parameters()


def test_a_refused_peft_config_leaves_nothing():
    model = bloom()
    before = look(model)
    with pytest.raises(AttachError, match="ALiBi"):
        peft.get_peft_model(model, bem.BemConfig("v2", rank=4))
    assert look(model) == before


def test_a_refused_second_adapter_leaves_the_first_acting():
    model = bloom()
    attached = probe.perturbed(bem.attach(model, "v4", rank=4))
    logits, before = probe.logits(attached.model, probe.token_ids()), look(model)
    with pytest.raises(AttachError, match="ALiBi"):
        attached.model.add_adapter("other", bem.BemConfig("v2", rank=4))
    assert look(model) == before
    assert torch.equal(probe.logits(attached.model, probe.token_ids()), logits)
    assert attached.detach() is model and look(model)[1] == 0


def test_a_refused_mount_leaves_nothing(monkeypatch):
    model = tiny_model("llama")
    experts, before = [expert(model, "a", 2, 0), expert(model, "b", 2, 1)], look(model)

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(peft_method, "teach", fails)
    with pytest.raises(KeyboardInterrupt):
        bem.mount(model, experts)
    assert look(model) == before


def spoil(model):
    with rolled_back(model):
        model.register_forward_hook(lambda *_: None)
        model.lm_head = torch.nn.Identity()
        model.train()
        raise ZeroDivisionError


def test_hooks_that_were_there_stay_and_can_be_removed():
    model, calls = tiny_model("llama"), []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ZeroDivisionError):
        spoil(model)
    assert not model.training and isinstance(model.lm_head, torch.nn.Linear)
    probe.logits(model, probe.token_ids())
    handle.remove()
    probe.logits(model, probe.token_ids())
    assert calls == [1] and not model._forward_hooks


def test_what_succeeds_stays():
    model = tiny_model("llama")
    with rolled_back(model):
        model.eval().mark = 3
    assert model.mark == 3
