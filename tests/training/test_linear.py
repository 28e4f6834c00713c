"""The linear control: an exact classifier on exact means."""

import pytest
import torch

from bem.training.data import Encoded
from bem.training.linear import fit_linear, turn_features
from tests.conftest import make_llama


def test_a_line_between_two_clouds_is_found():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    features = torch.randn(200, 5, generator=generator) + 3.0 * labels[:, None]
    classifier = fit_linear(features[:100], labels[:100], 2)
    assert (classifier(features[100:]) == labels[100:]).float().mean() > 0.98


def test_the_penalised_likelihood_is_at_its_minimum():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 3, generator=generator), torch.randint(3, (60,), generator=generator)
    found = fit_linear(x, y, 3, decay=0.1)
    weight = found.weight.clone().requires_grad_(True)
    scaled = (x - found.mean) / found.scale
    loss = torch.nn.functional.cross_entropy(scaled @ weight.t() + found.bias, y)
    (loss + 0.1 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4


def test_features_are_means_over_what_was_said_before_each_turn():
    model = make_llama()
    ids = [5, 6, 7, 8, 9, 10, 11]
    row = Encoded(ids, ids, 6, [False, False, True, False, False, True, False])
    (found,) = turn_features(model, [row, row][:1], 2, 0)
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(found[0], hidden[:3].mean(0))
    torch.testing.assert_close(found[1], hidden[3:6].mean(0))


def test_padding_does_not_show():
    model = make_llama()
    short = Encoded([5, 6, 7], [5, 6, 7], 2, [False, True, False])
    long = Encoded(list(range(5, 25)), list(range(5, 25)), 2, [False] * 19 + [True])
    alone = turn_features(model, [short], 1, 0)[0]
    beside = turn_features(model, [long, short], 1, 0)[1]
    assert beside == pytest.approx(alone, abs=1e-5)
