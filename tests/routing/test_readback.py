"""While tokens are decoded, inside a chunk and across its end, a router reads nothing back to the host."""

import pytest
import torch

from tests.conftest import make_llama
from tests.host_reads import noted
from tests.routing.mounted import mounted

IDS = torch.randint(3, 300, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"confidence": 0.9, "fallback": "c", "trust_radius": 0.1, "trust_norm": "spectral"},
        {"shared": "c", "trust_radius": 0.1, "trust_relative": True},
    ],
)
@pytest.mark.parametrize("composed", ["beforehand", "for each chunk"])
@torch.no_grad()
def test_decoding_with_a_router_reads_nothing_back(monkeypatch, settings, composed):
    monkeypatch.setattr("bem.experts.slab.GATHER_ABOVE", 0)  # and blocks are looked up
    if composed == "for each chunk":
        monkeypatch.setattr("bem.routing.composer.Rules.tabled", lambda *_: False)
    model = mounted(make_llama(), **settings)
    cache = model.model(input_ids=IDS[:, :10], use_cache=True).past_key_values
    for at in range(10, 20):  # the first token behind a prompt may count
        model.model(input_ids=IDS[:, at : at + 1], past_key_values=cache, use_cache=True)
    before = cache.layers[-1].state.running.number.clone()
    with noted() as reads:
        for at in range(20, 45):
            model.model(input_ids=IDS[:, at : at + 1], past_key_values=cache, use_cache=True)
    assert (cache.layers[-1].state.running.number - before).min() >= 3  # chunks ended
    assert reads == []
