import pytest
import torch

from bem.variants.kronecker import KroneckerFactorization, square_factors


def random(d_in, d_out, terms, cap=None):
    torch.manual_seed(0)
    module = KroneckerFactorization(d_in, d_out, terms, scale=1.5, spectral_cap=cap)
    module.a.data.normal_()
    return module


def dense(module):
    return (
        module.scale
        * sum(torch.kron(a, b) for a, b in zip(module.a, module.b, strict=True)).detach()
    )


@pytest.mark.parametrize(
    ("d_in", "d_out", "terms"), [(12, 6, 1), (24, 10, 3), (7, 5, 2), (64, 64, 2)]
)
def test_the_factored_product_is_the_dense_kronecker_product(d_in, d_out, terms):
    module, x = random(d_in, d_out, terms), torch.randn(2, 3, d_in)
    wanted = torch.ones(2, 3, d_out) + x @ dense(module).t()
    assert torch.allclose(module.update(torch.ones(2, 3, d_out), x, None, None), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "pair"),
    [(768, (24, 32)), (3072, (48, 64)), (11008, (86, 128)), (192, (12, 16)), (13, (1, 13))],
)
def test_factors_are_the_most_square_pair(n, pair):
    assert square_factors(n) == pair


@pytest.mark.parametrize("terms", [1, 3])
def test_sigma_is_the_largest_singular_value(terms):
    module = random(24, 20, terms)
    assert module.sigma() == pytest.approx(float(torch.linalg.svdvals(dense(module))[0]), rel=1e-3)


def test_sigma_of_one_term_is_the_product_of_sigmas():
    module = random(24, 20, 1)
    product = (
        torch.linalg.svdvals(module.a[0].detach())[0]
        * torch.linalg.svdvals(module.b[0].detach())[0]
    )
    assert module.sigma() == pytest.approx(1.5 * float(product), rel=1e-3)


def test_after_a_step_the_cap_holds():
    module = random(24, 20, 2, cap=0.25)
    module.after_step()
    assert float(torch.linalg.svdvals(dense(module))[0]) <= 0.25 * (1 + 1e-3)


def test_inside_the_cap_nothing_moves():
    module = random(24, 20, 2, cap=1e6)
    before = module.a.clone()
    module.after_step()
    assert torch.equal(module.a, before)


def test_a_direction_that_outgrows_the_old_one_is_found():
    """The last answer is an exact singular vector, at right angles to what grew since."""
    module = KroneckerFactorization(4, 4, 1, scale=1.0)
    module.a.data[0] = torch.diag(torch.tensor([0.9, 0.0]))
    module.b.data[0] = torch.eye(2) * torch.tensor([1.0, 0.0])
    assert module.sigma() == pytest.approx(0.9, rel=1e-3)
    module.a.data[0] = torch.diag(torch.tensor([0.9, 5.0]))
    assert module.sigma() == pytest.approx(5.0, rel=1e-3)
