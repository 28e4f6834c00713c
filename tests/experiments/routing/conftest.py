import pytest
import torch

from bem.adapters.lora import write_lora
from bem.experiments.routing.arms import PEERS
from tests.experiments.routing.lora_experts import updates


@pytest.fixture
def folders(tmp_path):
    return {name: write_lora(updates(i), tmp_path / name) for i, name in enumerate(("a", "b"))}


@pytest.fixture(params=PEERS)
def make(request):
    return PEERS[request.param]


@pytest.fixture
def ids():
    return torch.randint(2, 320, (2, 12), generator=torch.Generator().manual_seed(5))
