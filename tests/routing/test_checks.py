"""The router's contract, on every architecture; and that a router which breaks it is caught."""

import pytest
import torch

from bem.adapters.checks_models import ARCHITECTURES
from bem.control.state import ControlState
from bem.routing import router
from bem.routing.checks import check_router
from bem.routing.hysteresis import Limits, allowed
from bem.routing.mounted import Mounted
from bem.routing.router import AgenticRouter
from tests.conftest import make_llama
from tests.routing.mounted import mounted


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_router_keeps_its_contract(arch):
    check_router(mounted, [arch]).raise_if_failed()


def test_the_contract_holds_with_fading_and_a_trust_region():
    def make(model):
        return mounted(model, confidence=0.9, fallback="c", trust_radius=0.3, trust_norm="spectral")

    check_router(make, ["llama"]).raise_if_failed()


def test_the_contract_holds_where_ranks_and_strength_are_no_choice():
    """As they are by default: all ranks, as trained."""

    def make(model):
        return mounted(model, ranks=None, strengths=(1.0,))

    space = make(make_llama()).router.space
    assert (space.ranks, space.strengths, space.plain) == ((4,), (1.0,), (0, 0, 0))
    check_router(make, ["llama"]).raise_if_failed()


def test_a_router_that_reads_the_future_is_caught(monkeypatch):
    real = AgenticRouter._see

    def peeking(self, memory, evidence, pooled, turn):
        own = pooled.sums[:, 1:]  # the chunk's own tokens
        return real(self, memory + own.mean(-1, keepdim=True), evidence, pooled, turn)

    monkeypatch.setattr(AgenticRouter, "_see", peeking)
    report = check_router(mounted, ["llama"], ["prefix_causal"])
    assert not report.passed


def test_rules_that_are_not_kept_are_caught(monkeypatch):
    def lax(at, space, limits, available):
        return allowed(at, space, Limits(0.0, 0.0, 99, 99.0, 99), available)

    monkeypatch.setattr(router, "allowed", lax)
    checks = ["plans_are_short", "flips_stay_in_budget"]
    report = check_router(lambda model: mounted(model, flip_burst=0), ["llama"], checks)
    assert [o.passed for o in report.outcomes] == [False, False], report.table()


def test_a_crop_that_forgets_too_little_is_caught(monkeypatch):
    real = ControlState.crop

    def lazy(self, slots, keep):
        before = self.running.sums.clone()
        real(self, slots, keep)
        self.running.sums.copy_(before)  # what was cut off is still heard

    monkeypatch.setattr(ControlState, "crop", lazy)
    report = check_router(mounted, ["llama"], ["equal_after_cropping"])
    assert not report.passed and "cropped to" in report.outcomes[0].detail, report.outcomes


@pytest.mark.parametrize("fault", ["running", "others"])
def test_an_unloading_that_somebody_notices_is_caught(monkeypatch, fault):
    real = Mounted.unload

    def careless(self, name):
        if fault == "running":  # the slabs that sequences hold are written to
            for member in self.pack.members:
                member.block(self.router.space.option(name) - 1)[0].zero_()
        else:
            for parameter in self.router.policy.parameters():
                parameter.mul_(-1.0)
        real(self, name)

    monkeypatch.setattr(Mounted, "unload", torch.no_grad()(careless))
    report = check_router(mounted, ["llama"], ["survives_unloading"])
    noticed = "a running conversation" if fault == "running" else "noticed"
    assert not report.passed and noticed in report.outcomes[0].detail, report.outcomes
