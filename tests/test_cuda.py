"""The contracts on a GPU, where every tensor that somebody forgot to place shows; skipped without one."""

import pytest
import torch

import bem
from bem.adapters.checks import CHECKS, check_adapter
from bem.adapters.checks_models import tiny_model
from bem.adapters.checks_probe import perturbed
from bem.config import VARIANTS, TrainingConfig
from bem.routing.checks import check_router
from bem.training.data import Example
from bem.training.fit import fit
from tests.routing.mounted import mounted

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

HERE = [name for name in CHECKS if name != "compiles"]
ARCHITECTURES = ["llama", "gpt2"]


@pytest.fixture
def on_gpu():
    """Everything that is made without a word about its device is made on the GPU."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_keeps_the_contract(on_gpu, variant, architecture):
    def make(model):
        return bem.attach(model, variant, rank=4, chunk_size=8)

    check_adapter(make, [architecture], HERE).raise_if_failed()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_router_keeps_its_contract(on_gpu, architecture):
    check_router(mounted, [architecture]).raise_if_failed()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_that_was_moved_answers_as_on_the_cpu(variant):
    attached = perturbed(bem.attach(tiny_model("llama"), variant, rank=4, chunk_size=8))
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        here = attached.model(input_ids=ids).logits
        attached.model.to("cuda")
        there = attached.model(input_ids=ids.cuda()).logits.cpu()
    assert (here - there).abs().max() < 1e-4


def test_a_static_cache_holds_the_control_too():
    attached = perturbed(bem.attach(tiny_model("llama").cuda(), "v1", rank=4, chunk_size=8))
    ids = torch.arange(1, 31, device="cuda")[None]
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    grown = attached.model.generate(ids, **settings)
    fixed = attached.model.generate(ids, cache_implementation="static", **settings)
    assert torch.equal(grown, fixed)


@pytest.mark.parametrize("variant", ["s0", "v1", "v4"])
def test_training_on_a_gpu_follows_training_on_the_cpu(variant, tokenizer, micro_llama, tmp_path):
    rows = [Example(str(i), f"number {i}", (f"it is {i}",)) for i in range(8)]
    config = TrainingConfig(steps=4, batch_size=4, learning_rate=1e-2)
    losses = {}
    for device in ("cpu", "cuda"):
        model = micro_llama.to(device)
        attached = bem.attach(model, variant, rank=4, chunk_size=8)
        losses[device] = fit(attached, tokenizer, rows, config, tmp_path / device, 0).losses
        attached.detach()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-2)
