import pytest
import torch

from bem.errors import DataError
from bem.online.kl_region import KlRegion
from tests.online.test_penalties import SmallPolicy, named, situations


def moved(policy, by, seed=0):
    """The weights before, and the policy a random step of this length further on."""
    before = {n: p.detach().clone() for n, p in named(policy).items()}
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p += by * torch.randn_like(p)
    return before


@pytest.mark.parametrize("by", [1e-4, 0.1, 1.0, 10.0])
def test_whatever_is_proposed_both_bounds_hold_afterwards(by):
    policy = SmallPolicy()
    region = KlRegion.around(policy, *situations(50), near=0.01, far=0.02)
    result = region.limit(policy, moved(policy, by))
    near, far = region.kl(policy)
    assert result.accepted and (near, far) == (result.kl_near, result.kl_far)
    assert near <= 0.01 and far <= 0.02
    assert (result.scale == 1.0) == (by == 1e-4)


def test_the_step_that_is_left_is_a_part_of_the_proposed_one():
    policy = SmallPolicy()
    region = KlRegion.around(policy, *situations(50))
    before = moved(policy, 1.0)
    proposed = {n: p.detach().clone() for n, p in named(policy).items()}
    scale = region.limit(policy, before).scale
    for n, p in named(policy).items():
        torch.testing.assert_close(p.detach(), before[n] + scale * (proposed[n] - before[n]))


def test_small_accepted_steps_cannot_creep_away_from_the_base():
    policy = SmallPolicy()
    region = KlRegion.around(policy, *situations(50), near=0.005, far=0.02, halvings=6)
    results = []
    for _ in range(40):
        results.append(region.limit(policy, moved(policy, 0.3, seed=3)))
        region.accept(policy)
    assert all(region.kl(policy)[1] <= 0.02 for _ in results)
    assert max(r.kl_far for r in results) > 0.01  # it was used up
    assert not results[-1].accepted and "to the base (limit 0.02)" in results[-1].reason


def test_a_step_that_is_not_finite_is_undone():
    policy = SmallPolicy()
    region = KlRegion.around(policy, *situations())
    before = {n: p.detach().clone() for n, p in named(policy).items()}
    with torch.no_grad():
        policy.body.weight[0, 0] = float("nan")
    result = region.limit(policy, before)
    assert not result.accepted and result.reason == "the proposed step is not finite"
    assert all(torch.equal(p, before[n]) for n, p in named(policy).items())


def test_its_tensors_are_whole():
    policy = SmallPolicy()
    region = KlRegion.around(policy, *situations(20))
    moved(policy, 0.1)
    region.accept(policy)
    moved(policy, 0.1, seed=1)
    assert KlRegion.from_tensors(region.tensors()).kl(policy) == pytest.approx(region.kl(policy))
    with pytest.raises(DataError):
        KlRegion.from_tensors({"obs": torch.zeros(2, 3)})


def test_settings_that_cannot_be_honoured_are_errors():
    with pytest.raises(ValueError, match="near <= far"):
        KlRegion.around(SmallPolicy(), *situations(), near=0.2, far=0.1)
    obs, masks = situations()
    with pytest.raises(DataError, match="at least one row"):
        KlRegion.around(SmallPolicy(), obs[:0], [m[:0] for m in masks])
