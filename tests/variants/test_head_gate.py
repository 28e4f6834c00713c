import pytest
import torch

from bem.kernels.reference import FEW_ROWS
from bem.variants.base import Code
from bem.variants.head_gate import Gating, HeadGate

D_IN, D_OUT, RANK, GROUPS, HEADS, D_CONTROL = 24, 10, 6, 3, 6, 5


def gate(radius=None, **gating):
    torch.manual_seed(0)
    sizes = Gating(GROUPS, D_CONTROL, HEADS, **gating)
    module = HeadGate(D_IN, D_OUT, RANK, 12.0, sizes, radius=radius)
    for parameter in module.parameters():
        parameter.data.normal_()
    return module


def code(chunks=4, real=None):
    torch.manual_seed(1)
    number = torch.arange(1, chunks + 1)[None]
    real = torch.ones(1, chunks, dtype=torch.bool) if real is None else real
    return Code(torch.randn(1, chunks, D_CONTROL), torch.randn(1, chunks, 2 * HEADS), number, real)


def test_the_update_is_the_gated_sum_over_head_groups():
    module, x = gate(), torch.randn(1, 4, D_IN)
    gates = 2 * torch.sigmoid(module.gate(torch.cat([code().z, code().heads], -1)))
    wanted = torch.zeros(1, 4, D_OUT)
    for g in range(GROUPS):
        heads = x[..., 8 * g : 8 * (g + 1)]  # 24 inputs, 3 groups
        u = module.u[:, 2 * g : 2 * (g + 1)]  # 6 ranks, 3 groups
        wanted += 2.0 * gates[..., g : g + 1] * (heads @ module.v[g].t()) @ u.t()
    found = module.update(torch.zeros(1, 4, D_OUT), x, module.control(code())[0].float(), None)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
def test_a_decoded_token_is_updated_as_in_a_prompt_and_no_second_v_is_kept(rows):
    module, x, y = gate(), torch.randn(rows, 1, D_IN), torch.randn(rows, 1, D_OUT)
    control = module.control(code(rows))[0].float()
    with torch.no_grad():
        update = module.ready(torch.float32, rows)
        wanted = module.update(y, x, control, None)
        assert torch.allclose(
            update(y, x, control, None), wanted, atol=1e-5
        )  # sums of 24 in float32
        module.v.zero_()  # it multiplies by these very weights, not by another form of them
        assert torch.equal(update(y, x, control, None), y)


def test_gates_are_one_at_birth():
    torch.manual_seed(0)
    module = HeadGate(D_IN, D_OUT, RANK, 12.0, Gating(GROUPS, D_CONTROL, HEADS))
    assert torch.equal(
        module.control(code()), torch.full((1, 4, RANK), 2.0).double()
    )  # alpha / rank


def test_the_trust_region_holds_in_every_chunk():
    module = gate(radius=0.3)
    for c in module.control(code())[0]:
        v = torch.block_diag(*module.v).double()
        update = module.u.double() @ torch.diag(c) @ v
        assert torch.linalg.matrix_norm(update) <= 0.3 + 1e-5


def test_the_penalty_is_zero_for_uncorrelated_gates_and_large_for_equal_ones():
    module = gate(decorrelation=1.0).train()
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])  # orthogonal columns
    module._seen = (signs[None], code())
    assert module.penalty() < 1e-10
    module._seen = (signs[None, :, :1].expand(1, 4, 3), code())
    assert torch.allclose(module.penalty(), torch.tensor(1.0))  # every correlation is 1


def test_slots_without_tokens_do_not_count_in_the_penalty():
    module = gate(decorrelation=1.0).train()
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    gates = torch.cat([signs, torch.full((20, 3), 9.0)])[None]  # 20 empty slots, all alike
    real = (torch.arange(24) < 4)[None]
    module._seen = (gates, code(24, real))
    assert module.penalty() < 1e-10
