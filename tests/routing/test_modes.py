"""What a stretch of code changes is given back exactly."""

import torch
from torch import nn

from bem.routing.modes import mode, seeded


def test_the_same_seed_draws_the_same_and_the_caller_goes_on_where_it_was():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(7):
        one = torch.rand(2)
    with seeded(7):
        two = torch.rand(2)
    assert torch.equal(one, two)
    assert torch.equal(torch.rand(2), expected)


def test_every_module_gets_its_own_mode_back_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model.eval()
    model[1].train()  # as a caller left them: one of each
    try:
        with mode(model, training=True):
            assert model.training and model[0].training
            raise KeyError
    except KeyError:
        pass
    assert [m.training for m in (model, model[0], model[1])] == [False, False, True]
    with mode(model, training=False):
        assert not model[1].training
    assert model[1].training
