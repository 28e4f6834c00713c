"""The price that is stated is the work that is done."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import make_llama
from tests.routing.mounted import mounted


def counted(model, ids: torch.Tensor) -> int:
    """Matrix FLOPs of one forward pass without cache, by torch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("tokens", "settings"),
    [
        (64, {}),
        (64, {"chunk_size": 16, "d_read": 8, "memory": 24, "hidden": 12}),
        (8, {"strengths": (1.0,), "ranks": (2, 4)}),
    ],
)
def test_the_price_of_a_routed_stack_is_what_torch_counts(tokens, settings):
    ids = torch.randint(3, 300, (1, tokens))
    bare = counted(make_llama(), ids)
    free = {"spans": (1,), "plan_length": 99, **settings}  # a decision at every chunk, as priced
    routed = mounted(make_llama(), **free)
    added = counted(routed.model, ids) - bare
    assert added == pytest.approx(routed.price(tokens).flops_per_token * tokens, abs=0.5)


def test_the_price_of_a_decision_is_that_of_its_parts():
    policy = mounted(make_llama()).router.policy
    ids = torch.zeros(1, 8, policy.reader.token.in_features)
    observed = policy.actor.observed
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sums = policy.reader.embed(ids).sum(1, keepdim=True)
        memory = policy.reader.update_memory(sums, torch.zeros(1, observed.memory))[0]
        read = torch.cat([memory, torch.zeros(1, observed.read - observed.memory)], -1)
        value, _ = policy.critic(read)
        seen = torch.cat([read, value[:, None], torch.zeros(1, observed.done)], -1)
        policy.actor.logits(seen)
    assert counter.get_total_flops() == policy.flops(8)
