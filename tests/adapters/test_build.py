"""A new variant is one file and one registry line: here is one."""

from typing import ClassVar, Literal

import peft
import pytest
import torch
from pydantic import Field
from torch import nn

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.build import VARIANTS, Variant, at, nearest_divisor
from bem.adapters.checks import check_adapter
from bem.adapters.checks_models import tiny_model
from bem.adapters.sites import MLP_DOWN
from bem.config import KINDS
from bem.config.adapters import AdapterConfig
from bem.errors import AttachError, ConfigError
from bem.variants.base import Adapter, Flops
from tests.adapters.test_checks import HERE

# --- what would be bem/variants/shift.py -----------------------------------------------------------


class ShiftConfig(AdapterConfig):
    """Adds a bounded constant to a layer's output."""

    acting: ClassVar[tuple[str, ...]] = ("bound",)

    variant: Literal["shift"] = "shift"
    bound: float = Field(default=2.0, gt=0)
    """Largest absolute value of the constant."""


class Shift(Adapter):
    """Adds bound * tanh(a) to a frozen linear layer."""

    def __init__(self, d_out: int, bound: float):
        super().__init__()
        self.a, self.bound = nn.Parameter(torch.zeros(d_out)), bound

    def update(self, y, x, control, slot):
        return y + (self.bound * torch.tanh(self.a)).to(y.dtype)

    def flops(self) -> Flops:
        return Flops()


def shift(place, config: ShiftConfig) -> Shift:
    return Shift(place.site.d_out, config.bound)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(VARIANTS, "shift", Variant(ShiftConfig, at(MLP_DOWN), shift))


# ---------------------------------------------------------------------------------------------------


def test_a_new_variant_keeps_the_contract():
    make, archs = (lambda model: bem.attach(model, "shift", bound=3.0)), ["llama", "gpt2"]
    check_adapter(make, archs, HERE).raise_if_failed()


def test_a_new_variant_is_a_peft_method_at_once(tmp_path):
    config = bem.BemConfig("shift", bound=0.5, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    attached = bem.from_peft(model)
    for parameter in attached.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again = bem.load(tiny_model("llama"), tmp_path)
    assert again.config == ShiftConfig(bound=0.5) and again.version == attached.version
    assert torch.equal(
        probe.logits(again.model, probe.token_ids()), probe.logits(model, probe.token_ids())
    )


def test_its_knobs_are_its_own():
    with pytest.raises(ConfigError, match="'bound' is a knob of shift, not of s0"):
        bem.attach(tiny_model("llama"), "s0", bound=1.0)
    with pytest.raises(ConfigError, match=r"unknown key 'bund'\. Did you mean 'bound'"):
        bem.attach(tiny_model("llama"), "shift", bund=1.0)


def test_every_shipped_kind_has_modules_and_a_section():
    shipped = {k: v.config for k, v in VARIANTS.items() if k != "shift"}
    assert shipped == KINDS


def test_a_variant_without_a_site_says_what_to_do():
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp = nn.Identity()
    with pytest.raises(
        AttachError, match=r"variant 'v3' has none of its sites.*Lower router_layer"
    ):
        bem.attach(model, "v3")


@pytest.mark.parametrize(("n", "aim", "divisor"), [(12, 5, 4), (12, 7, 6), (7, 4, 1), (9, 6, 3)])
def test_the_nearest_divisor(n, aim, divisor):
    assert nearest_divisor(n, aim) == divisor
