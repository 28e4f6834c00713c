"""The contract, for every variant on every architecture."""

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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_keeps_the_contract(variant, architecture):
    report = check_adapter(
        lambda model: bem.attach(model, variant, rank=4, chunk_size=8), architectures=[architecture]
    )
    report.raise_if_failed()
    assert len(report.outcomes) == len(CHECKS)


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_settings_keep_the_contract(name):
    settings = {"rank": 4, "chunk_size": 8, **UNUSUAL[name]}
    check_adapter(
        lambda model: bem.attach(model, **settings), architectures=["llama"]
    ).raise_if_failed()


def test_a_broken_adapter_is_found_out():
    """The contract can fail: an update that looks at the whole sequence sees the future."""

    def cheat(model):
        attached = bem.attach(model, "s0", rank=4)
        for module in attached.modules():
            plain = module.update
            module.update = lambda y, x, c, plain=plain: plain(y, x + x.mean(1, keepdim=True), c)
        return attached

    report = check_adapter(
        cheat, ["llama"], ["identity_at_birth", "blind_to_the_future", "cache_is_exact"]
    )
    assert [o.passed for o in report.outcomes] == [True, False, False]
    with pytest.raises(bem.errors.AttachError, match="llama/blind_to_the_future"):
        report.raise_if_failed()
