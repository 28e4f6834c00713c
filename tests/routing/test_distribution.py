import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from bem.routing.distribution import HeadsDistribution

SIZES = (5, 3, 2)


def random_heads(seed, rows=7, dtype=torch.float64):
    """Logits and masks of three heads; row 0 has one option in every head."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(rows, n, generator=generator, dtype=dtype) for n in SIZES]
    masks = [torch.rand(rows, n, generator=generator) < 0.6 for n in SIZES]
    for mask in masks:
        mask[:, 0] = True
        mask[0, 1:] = False
    return logits, masks


def by_torch(logits, masks):
    """The same heads from torch.distributions, masked options at a logit of -1e9."""
    pairs = zip(logits, masks, strict=True)
    return [Categorical(logits=z.masked_fill(~m, -1e9)) for z, m in pairs]


def test_log_prob_kl_and_entropy_are_sums_of_torchs_own_categoricals():
    logits, masks = random_heads(0)
    others, _ = random_heads(1)
    ours, theirs = HeadsDistribution(logits, masks), HeadsDistribution(others, masks)
    expected, expected_other = by_torch(logits, masks), by_torch(others, masks)
    actions = ours.sample(torch.Generator().manual_seed(0))
    log_prob = sum(c.log_prob(actions[:, h]) for h, c in enumerate(expected))
    kl = sum(kl_divergence(p, q) for p, q in zip(expected, expected_other, strict=True))
    assert torch.allclose(ours.log_prob(actions), log_prob)
    assert torch.allclose(ours.kl(theirs), kl)
    assert torch.allclose(ours.entropy(), sum(c.entropy() for c in expected))


def test_hand_computed_numbers_of_a_masked_head():
    mask = torch.tensor([True, True, False])
    p = HeadsDistribution([torch.tensor([math.log(3.0), 0.0, 99.0])], [mask])  # 3/4, 1/4, 0
    q = HeadsDistribution([torch.tensor([0.0, 0.0, 0.0])], [mask])  # 1/2, 1/2, 0
    assert p.probs[0].tolist() == pytest.approx([0.75, 0.25, 0.0])
    assert float(p.kl(q)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(q.entropy()) == pytest.approx(math.log(2))
    assert float(p.log_prob(torch.tensor([1]))) == pytest.approx(math.log(0.25))
    assert p.mode().tolist() == [0]


def test_a_head_with_one_option_adds_exactly_nothing():
    logits, masks = random_heads(2, dtype=torch.float32)
    others, _ = random_heads(3, dtype=torch.float32)
    ours, theirs = HeadsDistribution(logits, masks), HeadsDistribution(others, masks)
    assert ours.log_prob(torch.zeros(7, 3, dtype=torch.long))[0] == 0
    assert ours.kl(theirs)[0] == 0
    assert ours.entropy()[0] == 0


def test_masked_options_leave_values_and_both_derivatives_finite_and_correct():
    logits, masks = random_heads(4)
    others, _ = random_heads(5)
    old = HeadsDistribution(others, masks)

    def kl(*z):
        return old.kl(HeadsDistribution(z, masks)).sum()

    def entropy(*z):
        return HeadsDistribution(z, masks).entropy().sum()

    def self_kl(*z):
        return HeadsDistribution(z, masks).kl(old).sum()

    free = tuple(z.clone().requires_grad_() for z in logits)
    for function in (kl, entropy, self_kl):
        assert torch.autograd.gradcheck(function, free)
        assert torch.autograd.gradgradcheck(function, free)
        for gradient, mask in zip(torch.autograd.grad(function(*free), free), masks, strict=True):
            assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


def test_even_infinite_or_nan_logits_of_impossible_options_do_no_harm():
    mask = torch.tensor([True, True, False])
    logits = torch.tensor([0.0, 1.0, float("nan")], requires_grad=True)
    p = HeadsDistribution([logits], [mask])
    (gradient,) = torch.autograd.grad(p.entropy() + p.kl(p.detach()), logits)
    assert torch.isfinite(gradient).all()


def test_samples_come_at_their_probabilities_and_never_from_a_masked_option():
    mask = torch.tensor([True, False, True]).expand(20_000, 3)
    logits = torch.tensor([0.0, 50.0, math.log(3.0)]).expand(20_000, 3)
    drawn = HeadsDistribution([logits], [mask]).sample(torch.Generator().manual_seed(0))[:, 0]
    counts = torch.bincount(drawn, minlength=3) / 20_000
    assert counts[1] == 0
    assert float(counts[2]) == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 20_000))


def test_same_generator_seed_same_actions_and_any_leading_shape():
    logits, masks = random_heads(6, rows=6)
    shaped = [z.reshape(2, 3, -1) for z in logits], [m.reshape(2, 3, -1) for m in masks]
    flat, folded = HeadsDistribution(logits, masks), HeadsDistribution(*shaped)
    a = flat.sample(torch.Generator().manual_seed(3))
    b = folded.sample(torch.Generator().manual_seed(3))
    assert b.shape == (2, 3, 3)
    assert torch.equal(a, b.reshape(6, 3))
    assert torch.equal(flat.mode(), folded.mode().reshape(6, 3))
    assert torch.allclose(flat.log_prob(a), folded.log_prob(b).reshape(6))


def test_a_row_without_a_possible_option_is_refused_and_the_head_named():
    logits, masks = random_heads(0)
    masks[1][4] = False
    with pytest.raises(ValueError, match="head span: 1 of 7 rows have no possible option"):
        HeadsDistribution(logits, masks, ("expert", "span", "rank"))


def test_the_log_prob_of_an_impossible_action_is_refused():
    logits, masks = random_heads(0)
    with pytest.raises(ValueError, match="head 0: 1 of 7 actions are masked"):
        HeadsDistribution(logits, masks).log_prob(
            torch.tensor([[1, 0, 0]] + [[0, 0, 0]] * 6)  # row 0 has option 0 only
        )


def test_kl_between_different_masks_is_refused():
    logits, masks = random_heads(0)
    ours = HeadsDistribution(logits, masks)
    with pytest.raises(ValueError, match="head 0: KL needs equal masks"):
        ours.kl(HeadsDistribution(logits, [torch.ones_like(m) for m in masks]))


def test_nan_logits_flow_through_but_cannot_be_drawn_from():
    p = HeadsDistribution([torch.tensor([[0.0, float("nan")]])], [torch.ones(1, 2).bool()])
    assert torch.isnan(p.entropy()).all()
    with pytest.raises(ValueError, match="head 0: 1 rows of logits are not finite"):
        p.sample(torch.Generator())
    with pytest.raises(ValueError, match="diverged"):
        p.mode()


def test_half_precision_logits_are_computed_in_float32():
    logits = torch.randn(4, 5, dtype=torch.bfloat16)
    p = HeadsDistribution([logits], [torch.ones(4, 5).bool()])
    assert p.log_probs[0].dtype == torch.float32
    assert torch.allclose(p.log_probs[0], logits.float().log_softmax(-1))
