import pytest
import torch

from bem.variants.base import Code
from bem.variants.rank_mask import RankMask


def code(chunks=50):
    torch.manual_seed(1)
    number = torch.arange(1, chunks + 1).expand(2, -1)
    return Code(torch.randn(2, chunks, 8), None, number, torch.ones_like(number, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["learned", "random", "fixed"])
@pytest.mark.parametrize("training", [True, False])
def test_exactly_k_ranks_act(kind, training):
    mask = RankMask(10, 3, 8, kind).train(training)(code())
    assert torch.equal(mask.sum(-1), torch.full((2, 50), 3.0).double())
    assert set(mask.detach().round(decimals=6).unique().tolist()) == {0.0, 1.0}


def test_inference_keeps_the_best_scores():
    module = RankMask(10, 3, 8).eval()
    scores = module.scores(code().z)
    kept = scores[module(code()).bool()].view(2, 50, 3).min(-1).values
    dropped = scores.masked_fill(module(code()).bool(), -torch.inf).max(-1).values
    assert (kept >= dropped).all()


def test_the_predictor_learns_through_the_hard_mask():
    """Gradient descent on the mask finds the wanted ranks: a mask without gradient never would."""
    torch.manual_seed(0)
    module, optimiser = RankMask(6, 2, 8), None
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    wanted = torch.tensor([0.0, 1, 0, 0, 1, 0])
    for _ in range(150):
        optimiser.zero_grad()
        (module(code()) - wanted).square().sum(-1).mean().backward()
        optimiser.step()
    agree = (module.eval()(code()) == wanted).all(-1).float().mean()
    assert agree > 0.95


def test_the_random_control_changes_with_the_chunk_and_never_between_runs():
    torch.manual_seed(5)
    module = RankMask(10, 3, 8, "random")
    mask = module(code())
    assert torch.equal(mask[0], mask[1]) and torch.equal(mask, module(code()))
    assert len({tuple(row) for row in mask[0].tolist()}) > 20


def test_more_active_ranks_than_ranks_is_refused():
    with pytest.raises(ValueError, match=r"k_active 5 must lie in 1..rank \(4\)"):
        RankMask(4, 5, 8)
