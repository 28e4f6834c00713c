"""Arms with a route, opened again to be timed."""

from types import SimpleNamespace

import torch

from bem.config import ArmConfig
from bem.experiments.routing.arms import reopened
from tests.conftest import make_llama
from tests.routing.mounted import mounted


@torch.no_grad()
def test_an_arm_whose_route_was_fixed_is_timed_under_an_expert(tmp_path):
    made = mounted(make_llama(), trained=False)
    made.save(tmp_path / "checkpoint")
    cell = SimpleNamespace(checkpoint=tmp_path / "checkpoint")
    ids = torch.arange(5, 30)[None]
    base = make_llama()(input_ids=ids).logits
    under = made.model(input_ids=ids, route=torch.ones_like(ids)).logits
    assert not torch.equal(under, base)
    fixed = reopened(make_llama(), ArmConfig(name="g", route="gold"), cell, None)  # pyright: ignore
    assert torch.equal(fixed.model(input_ids=ids).logits, under)
    ours = reopened(make_llama(), ArmConfig(name="r", route="ar0"), cell, None)  # pyright: ignore
    assert torch.equal(
        ours.model(input_ids=ids).logits, base
    )  # its router decides; this one never learned
