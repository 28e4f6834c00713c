"""The router's contract, on every architecture; and that a router which breaks it is caught."""

import pytest

from bem.adapters.checks_models import ARCHITECTURES
from bem.routing import router
from bem.routing.checks import check_router
from bem.routing.hysteresis import Limits, allowed
from bem.routing.router import AgenticRouter
from tests.routing.mounted import mounted


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_router_keeps_its_contract(arch):
    check_router(mounted, [arch]).raise_if_failed()


def test_the_contract_holds_with_fading_and_a_trust_region():
    def make(model):
        return mounted(model, confidence=0.9, fallback="c", trust_radius=0.3, trust_norm="spectral")

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
