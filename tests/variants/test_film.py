import pytest
import torch

from bem.variants.base import Code
from bem.variants.film import ResidualFiLMModule


@pytest.mark.parametrize(
    ("kind", "low", "high", "beta"), [("narrow", 0.8, 1.2, 0.1), ("wide", 0.5, 2.0, 0.5)]
)
def test_gamma_and_beta_stay_in_their_ranges_and_reach_them(kind, low, high, beta):
    module = ResidualFiLMModule(4, 3, kind)
    module.head.weight.data.fill_(100.0)
    z = torch.tensor([[[1.0, 1, 1], [-1, -1, -1]]])
    gamma_less_one, b = module.control(
        Code(z, None, torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool))
    ).chunk(2, -1)
    assert torch.allclose(gamma_less_one[0, 0] + 1, torch.full((4,), high).double())
    assert torch.allclose(gamma_less_one[0, 1] + 1, torch.full((4,), low).double())
    assert torch.allclose(b.abs(), torch.full((1, 2, 4), beta).double())


def test_modulation_by_hand():
    module = ResidualFiLMModule(2, 3)
    h, control = torch.tensor([[[2.0, 4.0]]]), torch.tensor([[0.5, -0.5, 0.1, 0.2]])
    assert torch.allclose(
        module.modulate(h, control, None), torch.tensor([[[3.1, 2.2]]])
    )  # 1.5*2+.1, .5*4+.2


def test_each_token_is_modulated_by_its_row_of_the_table():
    module, h = ResidualFiLMModule(2, 3), torch.ones(1, 3, 2)
    table = torch.tensor([[0.0, 0, 0, 0], [1, 1, 0.5, 0.5]])
    out = module.modulate(h, table, torch.tensor([0, 1, 0]))
    assert out[0, :, 0].tolist() == [1.0, 2.5, 1.0]
