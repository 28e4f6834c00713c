"""Which weights decay, and at which rate they are trained."""

import pytest
import torch
from torch import nn

from bem.config import TrainingConfig
from bem.training.optimizer import adamw, learning_rate


def test_matrices_decay_and_vectors_do_not():
    matrix, vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    optimizer = adamw([matrix, vector], TrainingConfig(learning_rate=0.01, weight_decay=0.5))
    matrix.grad, vector.grad = torch.zeros(2, 3), torch.zeros(3)
    optimizer.step()
    assert torch.equal(vector, torch.ones(3))
    torch.testing.assert_close(matrix.detach(), torch.full((2, 3), 1 - 0.01 * 0.5))


def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth():
    settings = TrainingConfig(steps=20, warmup=0.2, learning_rate=1.0)
    rates = [learning_rate(i, settings) for i in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == pytest.approx(1.0) and rates[19] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(50, settings) == pytest.approx(0.1)
    once = TrainingConfig(steps=1, warmup=0.0, learning_rate=1.0)
    assert learning_rate(0, once) == 1.0
