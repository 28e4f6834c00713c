import pytest
import torch

from bem.kernels.reference import few_grouped, kronecker, masked_low_rank

D_IN, D_OUT, RANK, TOKENS = 12, 7, 6, 5


def operands(groups=None):
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    v = randn(RANK, D_IN) if groups is None else randn(groups, RANK // groups, D_IN // groups)
    return randn(1, TOKENS, D_OUT), randn(1, TOKENS, D_IN), v, randn(3, RANK), randn(D_OUT, RANK)


def test_each_token_is_updated_by_its_row_of_the_table():
    y, x, v, c, u = operands()
    slot = torch.tensor([2, 0, 0, 1, 2])
    out = masked_low_rank(y, x, v, c, slot, u)
    for t in range(TOKENS):
        expected = y[0, t] + u @ torch.diag(c[slot[t]]) @ v @ x[0, t]
        assert torch.allclose(out[0, t], expected)


def test_without_slots_one_row_holds_for_all_tokens_or_each_has_its_own():
    y, x, v, c, u = operands()
    same = masked_low_rank(y, x, v, c[:1], None, u)
    assert torch.allclose(same, masked_low_rank(y, x, v, c, torch.zeros(5, dtype=torch.long), u))
    own = masked_low_rank(y[:, :3], x[:, :3], v, c, None, u)
    assert torch.allclose(own, masked_low_rank(y[:, :3], x[:, :3], v, c, torch.arange(3), u))


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_a_grouped_v_is_the_block_diagonal_one(groups, tokens):
    y, x, v, c, u = operands(groups)
    y, x, slot = y[:, :tokens], x[:, :tokens], torch.arange(tokens) % 3
    dense = torch.block_diag(*v)
    assert torch.allclose(
        masked_low_rank(y, x, v, c, slot, u), masked_low_rank(y, x, dense, c, slot, u)
    )


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_form_for_few_tokens_is_the_block_diagonal_one(groups, tokens):
    y, x, v, c, u = operands(groups)
    y, x, c = y[0, :tokens, None], x[0, :tokens, None], c[:tokens]  # a batch of one token each
    dense = masked_low_rank(y, x, torch.block_diag(*v), c, None, u)
    assert torch.allclose(few_grouped(y, x, v.mT, c, u), dense)


def test_masked_ranks_are_the_ranks_left_out():
    y, x, v, _, u = operands()
    kept = [0, 3, 4]
    mask = torch.zeros(1, RANK, dtype=torch.float64)
    mask[:, kept] = 1
    gathered = masked_low_rank(y, x, v[kept], mask[:, kept], None, u[:, kept])
    assert torch.allclose(masked_low_rank(y, x, v, mask, None, u), gathered)


def test_tokens_may_lie_flat_or_in_a_batch():
    y, x, v, c, u = operands()
    slot = torch.tensor([0, 1, 2, 0, 1])
    flat = masked_low_rank(y[0], x[0], v, c, slot, u)
    assert torch.equal(flat, masked_low_rank(y, x, v, c, slot, u)[0])


def test_kronecker_is_the_dense_product():
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(2, *s, generator=g, dtype=torch.float64) for s in ((3, 4), (5, 2)))
    x, y = torch.randn(6, 8, generator=g, dtype=torch.float64), torch.zeros(6, 15).double()
    dense = sum(torch.kron(p, q) for p, q in zip(a, b, strict=True))
    assert torch.allclose(kronecker(y, x, a, b, 0.5), 0.5 * x @ dense.t())


def test_a_table_in_float32_leaves_an_update_in_bfloat16():
    y, x, v, c, u = (t.to(torch.bfloat16) for t in operands())
    out = masked_low_rank(y, x, v, c[:1].float(), None, u)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out, masked_low_rank(y, x, v, c[:1], None, u), atol=0.25, rtol=0.05)


def test_the_last_bit_does_not_depend_on_whether_weights_train():
    y, x, v, c, u = (t.float() for t in operands())
    x = x.repeat(2, 9, 1).transpose(0, 1).contiguous().transpose(0, 1)  # as it leaves a scan
    y, slot = y.repeat(2, 9, 1), torch.zeros(x.shape[0] * x.shape[1], dtype=torch.long)
    frozen = masked_low_rank(y, x, v, c, slot, u)
    v.requires_grad = u.requires_grad = True
    assert torch.equal(masked_low_rank(y, x, v, c, slot, u), frozen)
