"""The contract, for every variant on every architecture."""

import subprocess
import sys

import pytest

import bem
from bem.adapters.checks import CHECKS, check_adapter
from bem.adapters.checks_models import ARCHITECTURES
from bem.config import VARIANTS

UNUSUAL = {
    "v1-random-mask": {"variant": "v1", "mask": "random"},
    "v1-fixed-mask": {"variant": "v1", "mask": "fixed", "k_active": 3},
    "v1-in-a-trust-region": {"variant": "v1", "trust_radius": 0.7},
    "v1-from-the-embeddings": {"variant": "v1", "router_layer": 0},
    "v1-at-the-mlp-alone": {"variant": "v1", "rank_attn": 0},
    "v4-wide": {"variant": "v4", "film_range": "wide", "router_layer": 3},
    "v2-in-a-trust-region": {"variant": "v2", "trust_radius": 0.7, "router_layer": 0},
    "v2-gates-alone": {"variant": "v2", "temperature": False, "decorrelation": 0.1},
    "pt1-two-groups": {"variant": "pt1", "head_groups": 2, "decorrelation": 0.1},
}


HERE = [name for name in CHECKS if name != "compiles"]
"""Checking the shapes of signatures, as these tests do, breaks graphs: that check runs in a process of its own."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_keeps_the_contract(variant, architecture):
    report = check_adapter(
        lambda model: bem.attach(model, variant, rank=4, chunk_size=8), [architecture], HERE
    )
    report.raise_if_failed()
    assert len(report.outcomes) == len(HERE)


COMPILES = """
import sys, bem
from bem.adapters.checks import check_adapter
make = lambda model: bem.attach(model, sys.argv[1], rank=4, chunk_size=8)
check_adapter(make, checks=["compiles"]).raise_if_failed()
"""


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_compiles(variant):
    run = [sys.executable, "-c", COMPILES, variant]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_settings_keep_the_contract(name):
    settings = {"rank": 4, "chunk_size": 8, **UNUSUAL[name]}
    check_adapter(lambda model: bem.attach(model, **settings), ["llama"], HERE).raise_if_failed()


def test_a_broken_adapter_is_found_out():
    """The contract can fail: an update that looks at the whole sequence sees the future."""

    def cheat(model):
        attached = bem.attach(model, "s0", rank=4)
        for module in attached.modules():
            plain = module.update
            module.update = lambda y, x, *control, plain=plain: plain(
                y, x + x.mean(1, keepdim=True), *control
            )
        return attached

    report = check_adapter(
        cheat, ["llama"], ["identity_at_birth", "blind_to_the_future", "cache_is_exact"]
    )
    assert [o.passed for o in report.outcomes] == [True, False, False]
    with pytest.raises(bem.errors.AttachError, match="llama/blind_to_the_future"):
        report.raise_if_failed()
