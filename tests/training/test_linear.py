"""The linear control: an exact classifier on exact means."""

import pytest
import torch

from bem.training.data import Encoded
from bem.training.linear import (
    PENALTIES,
    best_linear,
    fit_centroids,
    fit_linear,
    left_out,
    turn_features,
)
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


def test_wanted_probabilities_are_met_where_one_number_tells_the_classes_apart():
    x = torch.tensor([[0.0]] * 4 + [[1.0]] * 4)
    wanted = torch.tensor([[0.8, 0.2]] * 4 + [[0.3, 0.7]] * 4)
    found = fit_linear(x, wanted, 2, decay=0.0).scores(x).softmax(-1)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


def test_a_fold_is_judged_by_a_regression_that_did_not_see_it():
    generator = torch.Generator().manual_seed(0)
    x, folds = torch.randn(12, 3, generator=generator), torch.arange(12) % 3
    wanted = torch.nn.functional.one_hot(torch.arange(12) % 2, 2).float()
    found = left_out(x, wanted, folds, 0.1)
    alone = fit_linear(x[folds != 1], wanted[folds != 1], 2, 0.1).scores(x[folds == 1])
    torch.testing.assert_close(found[folds == 1], alone)


def test_the_penalty_is_the_one_that_left_out_folds_like_best():
    generator = torch.Generator().manual_seed(0)
    x, folds = torch.randn(60, 20, generator=generator), torch.arange(60) % 5
    wanted = torch.nn.functional.one_hot((x[:, 0] > 0).long(), 2).float()
    losses = {
        p: torch.nn.functional.cross_entropy(left_out(x, wanted, folds, p), wanted)
        for p in PENALTIES
    }
    expected = fit_linear(x, wanted, 2, min(losses, key=losses.__getitem__))
    assert torch.equal(best_linear(x, wanted, folds).weight, expected.weight)


def test_the_nearest_centroid_is_that_of_standardised_means():
    x = torch.tensor([[0.0, 0.0], [0.0, 100.0], [4.0, 0.0], [4.0, 100.0]])
    wanted = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    classify = fit_centroids(x, wanted)  # the second number, however large, tells nothing
    assert classify(torch.tensor([[1.9, 500.0], [2.1, -500.0]])).tolist() == [0, 1]


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
