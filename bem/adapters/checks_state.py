"""The contract: what an adapter is, and that it stays that, attached, saved, loaded and taken off."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bem.adapters.attach import load
from bem.adapters.attached import Attached
from bem.adapters.checks_models import VOCAB, tiny_model
from bem.adapters.checks_probe import (
    TOLERANCE,
    assert_equal,
    in_eval,
    logits,
    perturbed,
    seeded,
    token_ids,
)
from bem.adapters.lora import missed_by_peft
from bem.adapters.sites import find_sites
from bem.errors import CheckpointError

Make = Callable[[Any], Attached]


def identity_at_birth(make: Make, arch: str) -> str:
    """Attaching changes nothing."""
    model, ids = tiny_model(arch), token_ids()
    before = logits(model, ids)
    return assert_equal(logits(in_eval(make(model)).model, ids), before, 0.0)


def detach_restores(make: Make, arch: str) -> str:
    """Detaching gives back the model bit for bit: weights, flags, outputs, no hooks."""
    model, ids = tiny_model(arch), token_ids()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = logits(model, ids)
    back = perturbed(make(model)).detach()
    assert back is model, "another model came back"
    assert {n: p.requires_grad for n, p in back.named_parameters()} == flags, (
        "requires_grad changed"
    )
    assert all(torch.equal(p, weights[n]) for n, p in back.named_parameters()), "weights changed"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in back.modules()), "hooks remain"
    return assert_equal(logits(back, ids), before, 0.0)


def disable_restores(make: Make, arch: str) -> str:
    """PEFT's `disable_adapter` shows the base, and the adapter comes back afterwards."""
    model, ids = tiny_model(arch), token_ids()
    before = logits(model, ids)
    attached = perturbed(make(model))
    adapted = logits(attached.model, ids)
    with attached.model.disable_adapter():
        assert_equal(logits(attached.model, ids), before, 0.0)
    assert (adapted - before).abs().max() > 1e-2, (
        "the perturbed adapter does nothing: the check is void"
    )
    return assert_equal(logits(attached.model, ids), adapted, 0.0)


def round_trip(make: Make, arch: str) -> str:
    """What was saved is what loads, again and again, by BEM and by PEFT; a changed file is refused.
    Where PEFT itself puts no LoRA onto the layers of a static one, it is not asked."""
    attached, ids = perturbed(make(tiny_model(arch))), token_ids()
    before, version = logits(attached.model, ids), attached.version
    with tempfile.TemporaryDirectory() as work:
        first = attached.save(f"{work}/first")
        again = load(tiny_model(arch), first)
        assert_equal(logits(again.model, ids), before, 0.0)
        missed = (
            missed_by_peft(again.base, again.plan.parts) if again.config.variant == "s0" else ""
        )
        last = again if missed else _through_peft(again, arch, work, before)
        assert_equal(logits(last.model, ids), before, 0.0)
        assert again.version == last.version == version, "the version changed on the way"
        _flip_last_bit(first / "adapter_model.safetensors")
        try:
            load(tiny_model(arch), first)
        except CheckpointError:
            return missed
    raise AssertionError("a changed file was loaded")


def _through_peft(attached: Attached, arch: str, work: str, before: Tensor) -> Attached:
    """Saved by BEM, loaded and saved by PEFT, loaded by BEM."""
    second = attached.save(f"{work}/second")
    wrapped = PeftModel.from_pretrained(tiny_model(arch), str(second))
    is_lora = wrapped.peft_config["default"].peft_type == "LORA"  # PEFT's own code rounds otherwise
    assert_equal(logits(wrapped, token_ids()), before, TOLERANCE if is_lora else 0.0)
    wrapped.save_pretrained(f"{work}/third")
    return load(tiny_model(arch), f"{work}/third")


def foreign_scales_survive(make: Make, arch: str) -> str:
    """A LoRA of PEFT with a scale and a rank of its own at each site stays what it is when it is read,
    saved and read again. Only of a static LoRA."""
    config = make(tiny_model(arch)).config
    if config.variant != "s0":
        return "no static LoRA"
    ids, targets = token_ids(), sorted(s.name for s in find_sites(tiny_model(arch)).found)
    lora = LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=targets,
        rank_pattern={f"^{targets[0]}": 2},
        alpha_pattern={f"^{targets[-1]}": 5},
        use_rslora=True,
        fan_in_fan_out=arch == "gpt2",
        task_type="CAUSAL_LM",
    )
    with seeded():
        theirs = get_peft_model(tiny_model(arch), lora).eval()
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape) * 0.2
    expected = logits(theirs, ids)
    with tempfile.TemporaryDirectory() as work:
        theirs.save_pretrained(f"{work}/0")
        attached = load(tiny_model(arch), f"{work}/0")
        first, version = logits(attached.model, ids), attached.version
        assert_equal(first, expected, TOLERANCE)
        attached.save(f"{work}/1")
        again = load(tiny_model(arch), f"{work}/1")
        assert again.version == version, "the version changed on the way"
        return assert_equal(logits(again.model, ids), first, 0.0)


def _flip_last_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def price_is_true(make: Make, arch: str) -> str:
    """The stated parameters and matrix FLOPs are those that are there and that run."""
    model, tokens = tiny_model(arch).requires_grad_(False), 64
    ids = torch.arange(tokens)[None] % VOCAB

    def count(model: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            logits(model, ids)
        return counter.get_total_flops()

    plain = count(model)
    attached = perturbed(make(model))
    price = attached.price(tokens)
    assert price.parameters == sum(p.numel() for p in attached.parameters()), "parameters differ"
    logits(attached.model, ids)  # factors that depend on the weights alone are computed once
    real = count(attached.model) - plain
    assert abs(real - price.flops_per_token * tokens) < 0.5, (
        f"stated {price.flops_per_token * tokens}, real {real}"
    )
    return f"{real / tokens:.0f} FLOPs/token"
