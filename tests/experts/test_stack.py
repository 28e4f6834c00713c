"""A stack adds exactly what its experts add, in either form, for each row its own; each expert has
parameters of its own, and what acts is a slab that nobody writes to."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.budget import price_of
from bem.adapters.build import Parts
from bem.adapters.checks_models import tiny_model
from bem.errors import AttachError, CheckpointError
from bem.experts.compose import Decision, TrustRegion
from bem.experts.expert import Update, expert_of, write_lora
from bem.experts.slab import GATHER_ABOVE
from bem.experts.stack import ExpertStack, fixed_updates
from bem.experts.subspace import orthogonality_error, reserve

D_IN, D_OUT, RANKS = 10, 12, (3, 0, 5, 4)
FLOAT = torch.float32


def updates_of(ranks=RANKS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [Update(draw(D_OUT, rank), draw(rank, D_IN)) for rank in ranks]


def filled(form="dense", ranks=RANKS, most=None, **settings):
    stack = ExpertStack(D_IN, D_OUT, ranks, form, **settings)
    for expert, update in enumerate(updates_of(ranks)):
        stack.fill(expert, update)
    stack.mount(None, None, most)
    return stack


def frozen(stack):
    for p in stack.parameters():
        p.requires_grad = False
    return stack


def control_of(stack, gates):
    """A control table that follows the gates: (rows, E) -> (rows, R)."""
    return gates[..., stack.at(FLOAT).engine.owner]


def product(update):
    return update.u @ update.v


def data(*lead, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*lead, D_OUT, generator=generator),
        torch.randn(*lead, D_IN, generator=generator),
    )


# gates of each of six tokens
MIXES = {
    "one expert for all": [[0, 0, 1.0, 0]] * 6,
    "each row another": [[1.0, 0, 0, 0]] * 3 + [[0, 0, 0, 0.5]] * 3,
    "each token another, some none": [
        *([1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2.0, 0]),
        *([0, 1.0, 0, 0], [0, 0, 0, 1.0], [1.0, 0, 0, 0]),
    ],
    "several at once": [[1.0, 0.3, -0.5, 2.0]] * 3 + [[0, 0, 0.1, 0.2]] * 3,
    "none": [[0.0, 0, 0, 0]] * 6,
}
MOST = {"several at once": None}
FORMS = ["dense", "gathered", "auto"]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Each way of multiplying; auto gathers wherever that spares anything."""
    monkeypatch.setattr("bem.experts.slab.GATHER_ABOVE", 0)
    return request.param


@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize("shared", [False, True])
def test_it_adds_the_gated_sum_of_its_experts(form, mix, shared):
    gates, (y, x) = torch.tensor(MIXES[mix]), data(2, 3)
    stack = filled(form, most=MOST.get(mix, 1))
    deltas = torch.stack([product(update) for update in updates_of()])
    expected = y + torch.einsum("te,eoi,ti->to", gates, deltas, x.flatten(0, 1)).view(y.shape)
    rows, slot = gates, None
    if shared:  # a table of the rows that differ, and which of them governs each token
        rows, slot = torch.unique(gates, dim=0, return_inverse=True)
    kept, table = y.clone(), control_of(stack, rows)
    actual = stack.update(y, x, table, slot)
    assert torch.allclose(actual, expected, atol=1e-4)
    assert torch.equal(y, kept)  # the frozen layer's output is left alone
    flat = stack.update(y.flatten(0, 1), x.flatten(0, 1), table, slot)
    assert torch.allclose(flat, expected.flatten(0, 1), atol=1e-4)  # tokens flattened, as OPT does


def test_one_row_of_control_holds_for_all_tokens(form):
    stack, (y, x) = filled(form, most=1), data(2, 3)
    row = control_of(stack, torch.tensor([[0, 0, 1.0, 0]]))
    expected = y + x @ product(updates_of()[2]).T
    assert torch.allclose(stack.update(y, x, row, None), expected, atol=1e-4)


@pytest.mark.parametrize("mix", [m for m in MIXES if m != "none"])
def test_both_forms_have_the_same_gradients(form, mix):
    gates, grads = torch.tensor(MIXES[mix]), []
    for kind in ("dense", form):
        stack, (y, x) = filled(kind, most=MOST.get(mix, 1)), data(2, 3)
        control = control_of(stack, gates).requires_grad_()
        for tensor in (y, x):
            tensor.requires_grad_()
        stack.update(y, x, control, None).square().sum().backward()
        # a block that nobody uses has a gradient at its zero gate in the dense form alone
        at_work = control.grad * (control != 0)
        grads.append((*(p.grad for p in stack.parameters()), y.grad, x.grad, at_work))
    for dense, other in zip(*grads, strict=True):
        assert torch.allclose(dense, other, rtol=1e-4, atol=1e-2)


def test_auto_stays_dense_where_the_gates_want_a_gradient(monkeypatch):
    monkeypatch.setattr("bem.experts.slab.GATHER_ABOVE", 0)
    stack, (y, x) = filled("auto", most=1), data(2, 1)
    control = torch.zeros(2, 12, requires_grad=True)
    stack.update(y, x, control, None).sum().backward()
    assert control.grad.abs().min() > 0


def test_a_masked_rank_inside_a_used_block_stays_out(form):
    y, x = data(1, 4)
    control = torch.zeros(1, 12)
    control[..., 4] = 2.0  # the second rank of expert 2 alone
    dense = filled("dense").update(y, x, control, None)
    assert torch.allclose(filled(form, most=1).update(y, x, control, None), dense, atol=1e-5)


@torch.no_grad()
def test_the_blocks_in_use_are_looked_up_once_while_a_chunk_is_decoded(monkeypatch):
    stack, (y, x) = frozen(filled("gathered", ranks=(3, 2, 5, 4), most=1)), data(2, 1)
    slab, lookups = stack.at(FLOAT), []
    real = torch.Tensor.index_select
    monkeypatch.setattr(
        torch.Tensor, "index_select", lambda *args: lookups.append(args) or real(*args)
    )
    control = control_of(stack, torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]]))
    first = slab.update(y, x, control, None)
    once = len(lookups)
    assert once and torch.equal(slab.update(y, x, control, None), first)
    assert len(lookups) == once
    control[1] = control_of(stack, torch.tensor([0, 1.0, 0, 0]))
    expected = filled("dense", ranks=(3, 2, 5, 4)).update(y, x, control, None)
    assert torch.allclose(slab.update(y, x, control, None), expected, atol=1e-5)
    other = control.clone()
    other[0] = 0
    expected = filled("dense", ranks=(3, 2, 5, 4)).update(y, x, other, None)
    assert torch.allclose(slab.update(y, x, other, None), expected, atol=1e-5)


@torch.no_grad()
def test_other_weights_are_another_slab_and_the_old_one_stays_as_it_was(form):
    stack, (y, x) = frozen(filled(form, most=2)), data(2, 1)
    control = control_of(stack, torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0.5]]))
    old = stack.at(FLOAT)
    assert stack.at(FLOAT) is old
    before = old.update(y, x, control, None)
    changes = (
        lambda: stack.fill(3, updates_of(seed=9)[3]),
        lambda: stack.clear(0),
        lambda: stack.u["2"].mul_(2.0),
        lambda: stack.half().float(),  # other values, perhaps at the old address
        lambda: setattr(stack.v["3"], "data", torch.ones_like(stack.v["3"])),
        lambda: stack.load_state_dict(filled().state_dict()),
    )
    for change in changes:
        last = stack.at(FLOAT)
        change()
        assert stack.at(FLOAT) is not last
        expected = y.clone()
        for row, gates in enumerate(([1.0, 0, 0, 0], [0, 0, 1.0, 0.5])):
            for expert, gate in enumerate(gates):
                expected[row] += gate * x[row] @ product(stack.update_of(expert)).T
        assert torch.allclose(stack.update(y, x, control, None), expected, atol=1e-4)
        assert torch.equal(old.update(y, x, control, None), before)


def test_a_slab_made_in_inference_mode_can_be_trained_around():
    stack, (y, x) = frozen(filled(most=1)), data(2, 1)
    control = control_of(stack, torch.tensor([[1.0, 0, 0, 0]]))
    with torch.inference_mode():
        stack.update(y, x, control, None)
        stack.compose(
            Decision(torch.eye(4)[:1], torch.tensor([9]), torch.ones(1)), TrustRegion(1.0)
        )
    x.requires_grad_()
    stack.update(y, x, control, None).sum().backward()
    assert x.grad.abs().max() > 0


def test_each_expert_has_an_optimiser_state_of_its_own():
    stack, (y, x) = filled("dense"), data(2, 3)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=0.1, weight_decay=0.5)
    before = [stack.update_of(e) for e in range(4)]
    for p in stack.factors(2):
        p.requires_grad = True
    others = [p for e in (0, 3) for p in stack.factors(e)]
    for p in others:
        p.requires_grad = False
    loss = (stack.update(y, x, torch.ones(1, 12), None) - 1).square().mean()
    loss.backward()
    optimizer.step()
    assert set(optimizer.state) == set(stack.factors(2))
    for expert, update in enumerate(before):
        same = torch.equal(stack.update_of(expert).v, update.v)
        assert same == (expert != 2)  # neither decay nor momentum reaches the others
    with pytest.raises(AttachError, match="expert 1 does not touch this site"):
        stack.factors(1)


def test_bfloat16_tokens_meet_float32_experts(form):
    stack, (y, x) = filled(form), data(2, 3)
    control = control_of(stack, torch.tensor(MIXES["several at once"]))
    actual = stack.update(y.bfloat16(), x.bfloat16(), control.bfloat16(), None)
    assert actual.dtype == torch.bfloat16
    assert torch.allclose(actual.float(), stack.update(y, x, control, None), rtol=0.05, atol=0.3)


def test_empty_batches_and_stacks_without_ranks_work(form):
    stack = filled(form)
    y, x = data(0, 3)
    assert stack.update(y, x, torch.zeros(1, 12), None).shape == (0, 3, D_OUT)
    none = ExpertStack(D_IN, D_OUT, [0, 0], form)
    y, x = data(2, 3)
    assert torch.equal(none.update(y, x, torch.zeros(1, 0), None), y)
    none.fill(0, Update(torch.zeros(D_OUT, 0), torch.zeros(0, D_IN)))
    assert none.control_width == 0 and none.flops().per_token == 0


def test_64_experts_of_64_ranks_work_in_every_form(form):
    (y, x), control = data(2, 3), torch.zeros(2, 4096)
    control[0, 64:128], control[1, 4032:] = 1.0, 0.5
    slot = torch.tensor([0, 0, 0, 1, 1, 1])
    dense = ExpertStack(D_IN, D_OUT, [64] * 64, "dense")
    for u in dense.u.values():
        torch.nn.init.normal_(u)
    other = ExpertStack(D_IN, D_OUT, [64] * 64, form)
    other.load_state_dict(dense.state_dict())
    other.mount(None, None, 1)
    expected = dense.update(y, x, control, slot)
    assert torch.allclose(other.update(y, x, control, slot), expected, rtol=1e-4, atol=1e-3)


def test_a_long_prefill_gathers_whole_chunks_and_scattered_tokens(form):
    y, x = data(2, 200)
    ranks = (3, 2, 5, 4, 4, 4, 4)
    stack = filled(form, ranks, most=1)
    table = control_of(stack, torch.eye(7)[[0, 2, 3]])
    slot = torch.tensor([0, 1, 0, 2]).repeat_interleave(50).repeat(2)
    dense = filled("dense", ranks).update(y, x, table, slot)
    assert torch.allclose(stack.update(y, x, table, slot), dense, atol=1e-4)


def test_a_new_stack_changes_nothing():
    stack, (y, x) = ExpertStack(D_IN, D_OUT, RANKS), data(2, 3)
    assert torch.equal(stack.update(y, x, torch.ones(1, 12), None), y)


def test_filling_leaves_the_product_and_orders_the_ranks_by_singular_value():
    stack = filled()
    for expert, update in enumerate(updates_of()):
        start, stop = stack.spans[expert]
        dense = update.u.double() @ update.v.double()
        kept = stack.update_of(expert)
        assert torch.allclose(product(kept).double(), dense, atol=1e-5)
        values = torch.linalg.svdvals(dense)[: stop - start]
        assert torch.allclose(stack.at(FLOAT).importance[start:stop], values, atol=1e-4)
        assert torch.allclose(kept.u.norm(dim=0), values.float(), atol=1e-4)
        assert torch.allclose(kept.v @ kept.v.T, torch.eye(stop - start), atol=1e-5)


@pytest.mark.parametrize(("d_in", "rank"), [(4, 6), (9, 6), (9, 20)])
def test_ranks_beyond_those_of_the_layer_do_nothing_yet_and_can_learn(d_in, rank):
    stack = ExpertStack(d_in, 3, [rank])
    u, v = torch.randn(3, rank), torch.randn(rank, d_in)
    stack.fill(0, Update(u, v))
    kept = stack.update_of(0)
    assert torch.allclose(product(kept), u @ v, atol=1e-4)
    assert stack.at(FLOAT).importance[3:].tolist() == [0.0] * (rank - 3)
    room = min(rank, d_in)  # unit rows, orthogonal as far as there is room
    assert torch.allclose(kept.v[:room] @ kept.v[:room].T, torch.eye(room), atol=1e-5)
    assert torch.allclose(kept.v.norm(dim=1), torch.ones(rank), atol=1e-5)
    y, x = torch.randn(5, 3), torch.randn(5, d_in)
    stack.update(y, x, torch.ones(1, rank), None).square().sum().backward()
    assert stack.u["0"].grad.abs().sum(0).min() > 0


def test_an_expert_with_fewer_ranks_than_its_block_fits_and_with_more_is_refused():
    stack, update = filled(), updates_of((2,), seed=5)[0]
    stack.fill(2, update)
    kept = stack.update_of(2)
    assert torch.allclose(kept.u @ kept.v, update.u @ update.v, atol=1e-5)
    with pytest.raises(AttachError, match=r"expert 0 has room for u \(12, 3\).*got \(12, 5\)"):
        stack.fill(0, updates_of((5,))[0])
    with pytest.raises(AttachError, match="expert 1 has room for u"):
        stack.fill(1, update)  # the block without ranks
    with pytest.raises(AttachError, match="no expert 4: this stack holds 4"):
        stack.fill(4, update)


def test_canonical_form_is_restored_after_training_in_place():
    stack = filled()
    with torch.no_grad():
        for u in stack.u.values():
            u.add_(torch.randn_like(u))
    before = [stack.update_of(e) for e in range(4)]
    stack.canonicalise()
    for expert, update in enumerate(before):
        kept, (start, stop) = stack.update_of(expert), stack.spans[expert]
        assert torch.allclose(product(kept), product(update), atol=1e-4)
        values = torch.linalg.svdvals(product(update))[: stop - start].double()
        assert torch.allclose(stack.at(FLOAT).importance[start:stop], values, atol=1e-4)


def test_an_untrained_expert_can_still_learn_after_it_was_brought_into_canonical_form():
    stack, (y, x) = ExpertStack(D_IN, D_OUT, [3, 2], "dense"), data(2, 3)
    stack.canonicalise()
    stack.update(y, x, torch.ones(1, 5), None).square().sum().backward()
    assert all(u.grad.abs().sum(0).min() > 0 for u in stack.u.values())


def test_a_cleared_expert_is_gone_and_the_others_are_not():
    stack, (y, x) = filled(), data(2, 3)
    others = control_of(stack, torch.tensor([[1.0, 1.0, 0.0, 1.0]]))
    before = stack.update(y, x, others, None)
    stack.clear(2)
    assert torch.allclose(stack.update(y, x, torch.ones(1, 12), None), before, atol=1e-5)
    assert stack.at(FLOAT).importance[3:8].tolist() == [0.0] * 5


def test_a_stack_waits_for_a_decision():
    with pytest.raises(AttachError, match="a router decides"):
        filled().control(None)


@torch.no_grad()
def test_a_copy_and_a_saved_state_give_the_same_numbers(form):
    stack, (y, x) = filled(form), data(2, 3)
    control = torch.ones(1, 12)
    stack.update(y, x, control, None)  # it may keep something now
    fresh = ExpertStack(D_IN, D_OUT, RANKS, form)
    fresh.load_state_dict(stack.state_dict())
    before, random = stack.update(y, x, control, None), torch.random.get_rng_state()
    for other in (copy.deepcopy(stack), stack.twin(), fresh):
        assert torch.equal(other.update(y, x, control, None), before)
        for p in other.parameters():
            p.add_(1.0)
        assert torch.equal(stack.update(y, x, control, None), before)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_stack_takes_over_what_acts_in_another():
    live, shadow = frozen(filled()), frozen(filled())
    shadow.u["0"].mul_(3.0)
    old, new = live.at(FLOAT), shadow.at(FLOAT)
    live.take(shadow)
    assert live.at(FLOAT) is new and live.at(FLOAT) is not old
    shadow.u["0"].mul_(3.0)  # what the shadow does afterwards is its own affair
    assert live.at(FLOAT) is new and torch.equal(live.u["0"], new.block(0)[0])


def bytes_held(stack, *slabs):
    """Of parameters and slabs together; a storage counts once."""
    tensors = [*stack.parameters(), *(t for s in slabs for t in (s.rows_of_u, s.v))]
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_frozen_experts_are_held_once(form):
    stack, once = frozen(filled(form)), 4 * 12 * (D_IN + D_OUT)
    before = [p.clone() for p in stack.parameters()]
    slab = stack.at(FLOAT)
    assert bytes_held(stack, slab) == once
    assert all(map(torch.equal, stack.parameters(), before))
    assert stack.at(FLOAT) is slab  # which storage it is is no change
    changes = (
        lambda: stack.fill(3, updates_of(seed=9)[3]),
        lambda: stack.clear(0),
        lambda: stack.load_state_dict(filled().state_dict()),
        lambda: stack.half().float(),
        lambda: stack.take(frozen(filled(form))),
        lambda: stack.mount(None, None, 1),
    )
    for change in changes:
        change()
        assert bytes_held(stack, stack.at(FLOAT)) == once
    other = stack.at(torch.bfloat16)  # parameters of another dtype than what acts: a copy of these
    assert bytes_held(stack, stack.at(FLOAT), other) == once + once // 2


def test_experts_that_train_have_storage_of_their_own_and_leave_the_slab(form):
    stack = frozen(filled(form))
    slab = stack.at(FLOAT)
    before, once = [t.clone() for t in (slab.u, slab.v)], bytes_held(stack, slab)
    for parameter in stack.parameters():
        parameter.requires_grad = True
    assert bytes_held(stack, slab) == 2 * once and all(
        p.is_contiguous() for p in stack.parameters()
    )
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(1.0)
    assert torch.equal(slab.u, before[0]) and torch.equal(slab.v, before[1])
    assert bytes_held(frozen(stack), stack.at(FLOAT)) == once


def test_two_stacks_over_one_slab_do_not_meet():
    live, shadow = frozen(filled()), frozen(filled())
    assert shadow.at(FLOAT) is not live.at(FLOAT)
    live.take(shadow)
    assert (
        live.v["3"].data_ptr() == shadow.v["3"].data_ptr() == live.at(FLOAT).block(3)[1].data_ptr()
    )
    before = live.v["3"].clone()
    shadow.v["3"].mul_(2.0)
    assert torch.equal(live.v["3"], before) and torch.equal(live.at(FLOAT).block(3)[1], before)
    live.clear(3)
    assert torch.equal(shadow.v["3"], 2 * before)


def test_a_saved_state_is_no_view_of_what_acts(tmp_path):
    stack = frozen(filled())
    slab = stack.at(FLOAT)
    save_file(stack.state_dict(), tmp_path / "stack.safetensors")
    fresh = ExpertStack(D_IN, D_OUT, RANKS)
    fresh.load_state_dict(load_file(tmp_path / "stack.safetensors"))
    assert all(map(torch.equal, fresh.parameters(), stack.parameters()))
    before = slab.u.clone()
    for tensor in stack.state_dict().values():
        tensor.zero_()
    assert torch.equal(slab.u, before) and stack.at(FLOAT) is slab


def test_how_many_experts_are_multiplied_follows_from_sizes_alone():
    widths = D_IN + D_OUT
    rank = GATHER_ABOVE // widths + 1  # of one expert: sparing it pays

    def multiplied(form="auto", most=1, rows=1, experts=4):
        stack = ExpertStack(D_IN, D_OUT, [rank] * experts, form)
        stack.mount(None, None, most)
        return stack.flops(tokens=64 * (rows - 1)).per_token // (2 * rank * widths)

    assert multiplied() == 1 and multiplied(most=2) == 2
    assert multiplied(rows=2) == 2 and multiplied(rows=9) == 4
    assert multiplied("dense") == 4 and multiplied(most=None) == 4
    small = ExpertStack(D_IN, D_OUT, [1] * 4)
    small.mount(None, None, 1)
    assert small.flops(1).per_token == 2 * 4 * widths


@torch.no_grad()
@pytest.mark.parametrize("most", [1, 2, None])
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_the_price_is_what_runs(form, most, norm):
    """In a prefill of whole chunks: a row of control for each, and one for the chunk before."""
    stack, region, tokens = frozen(filled(form, (3, 2, 5, 4, 4, 4, 4))), TrustRegion(1.0, norm), 48
    stack.mount(region, None, most)
    chunks = Decision(torch.eye(7)[:6], torch.full((6,), 99), torch.ones(6), most)
    stack.compose(chunks, region)  # what depends on the weights alone is there
    y, x = data(1, tokens)
    slot = torch.arange(1, 7).repeat_interleave(8)
    with FlopCounterMode(display=False) as counter:
        control = stack.compose(chunks, region).float()
        stack.update(y, x, torch.cat([control[:1], control]), slot)
    price = stack.flops(tokens, chunk_size=8)
    assert counter.get_total_flops() == price.per_token * tokens + price.per_chunk * 6


def test_what_is_composed_beforehand_has_no_price():
    stack = filled()
    stack.mount(None, 2.0, 1)
    assert stack.flops().per_chunk == 0
    with torch.device("meta"):  # priced without being made
        on_meta = ExpertStack(D_IN, D_OUT, RANKS)
        assert price_of({"site": Parts(on_meta)}).parameters == 12 * (D_IN + D_OUT)


# --- reserved directions ------------------------------------------------------------------------


def test_reserved_experts_stay_orthogonal_through_training():
    stack, (y, x) = ExpertStack(D_IN, D_OUT, [3, 0, 4, 5], "dense"), data(4, 6)
    assert stack.reserve(reserve(D_OUT, [3, 0, 4, 5], seed=0)) == [0.0] * 4
    optimizer = torch.optim.AdamW(stack.parameters(), lr=0.1)
    for _ in range(5):
        loss = (stack.update(y, x, torch.ones(1, 12), None) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stack.after_step()
    assert max(float(u.abs().max()) for u in stack.u.values()) > 0.1  # it did learn
    blocks = [stack.update_of(e).u for e in range(4)]
    assert orthogonality_error(blocks) <= 1e-5
    before = [stack.update_of(e).u @ stack.update_of(e).v for e in range(4)]
    stack.canonicalise()
    assert orthogonality_error([stack.update_of(e).u for e in range(4)]) <= 1e-5
    for expert, product in enumerate(before):
        kept = stack.update_of(expert)
        assert torch.allclose(kept.u @ kept.v, product, atol=1e-5)


def test_reserving_directions_says_what_an_expert_loses():
    stack = filled(ranks=(2, 2))
    bases = [torch.eye(D_OUT)[:, :6], torch.eye(D_OUT)[:, 6:]]
    u = stack.update_of(0).u
    lost = stack.reserve(bases)
    assert lost[0] == pytest.approx(float(u[6:].norm() / u.norm()), rel=1e-5)
    assert stack.update_of(0).u[6:].abs().max() == 0.0


def test_an_expert_outside_its_reserved_directions_is_refused():
    stack = ExpertStack(D_IN, D_OUT, [2, 2])
    stack.reserve([torch.eye(D_OUT)[:, :6], torch.eye(D_OUT)[:, 6:]])
    inside = Update(torch.eye(D_OUT)[:, 6:8], torch.randn(2, D_IN))
    stack.fill(1, inside)
    kept = stack.update_of(1)
    assert torch.allclose(kept.u @ kept.v, inside.u @ inside.v, atol=1e-5)
    with pytest.raises(AttachError, match=r"100\.0% of expert 0 lies outside"):
        stack.fill(0, inside)


def test_bases_that_do_not_fit_or_overlap_are_refused():
    stack = ExpertStack(D_IN, D_OUT, [2, 2])
    with pytest.raises(AttachError, match="2 experts of width 12 got bases"):
        stack.reserve([torch.eye(D_OUT)])
    with pytest.raises(AttachError, match=r"orthonormal only within 1\.0e"):
        stack.reserve([torch.eye(D_OUT)[:, :3], torch.eye(D_OUT)[:, 2:5]])
    with pytest.raises(AttachError, match=r"orthonormal only within 3\.0e"):
        stack.reserve([2 * torch.eye(D_OUT)[:, :3], torch.eye(D_OUT)[:, 3:5]])


# --- export --------------------------------------------------------------------------------------


def stacks_of_two(model):
    """Two experts of different ranks on every site but the first, and an s0 that one comes from."""
    attached = probe.perturbed(bem.attach(tiny_model("llama"), "s0", rank=3, router_layer=1))
    expert = expert_of(attached, "one")
    stacks = {}
    for site, update in expert.updates.items():
        (d_out, _), (_, d_in) = update.u.shape, update.v.shape
        stack = stacks[site] = ExpertStack(d_in, d_out, [3, 2])
        stack.fill(0, update)
        stack.fill(1, Update(torch.randn(d_out, 2) * 0.2, torch.randn(2, d_in) * 0.2))
    return attached, stacks


@pytest.mark.parametrize("region", [None, TrustRegion(0.8), TrustRegion(0.5, "spectral")])
def test_a_fixed_gate_is_served_by_peft_with_the_same_logits(tmp_path, region):
    _, stacks = stacks_of_two(tiny_model("llama"))
    decision = Decision(torch.tensor([1.0, -0.5]), torch.tensor(4), torch.tensor(0.9))
    live = tiny_model("llama")
    for site, stack in stacks.items():
        control = stack.compose(decision, region).detach()
        live.get_submodule(site).register_forward_hook(
            lambda m, args, y, s=stack, c=control: s.update(y, args[0], c[None].float(), None)
        )
    updates = fixed_updates(stacks, decision, region)
    assert {len(update.v) for update in updates.values()} == {4}  # the rank budget
    write_lora(updates, tmp_path)
    served = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    with torch.no_grad():
        assert torch.allclose(
            probe.logits(served, probe.token_ids()),
            probe.logits(live, probe.token_ids()),
            atol=1e-5,
        )


def test_one_expert_alone_is_exported_as_itself(tmp_path):
    attached, stacks = stacks_of_two(tiny_model("llama"))
    write_lora(fixed_updates(stacks, torch.tensor([1.0, 0.0])), tmp_path)
    served = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert torch.allclose(
        probe.logits(served, probe.token_ids()),
        probe.logits(attached.model, probe.token_ids()),
        atol=1e-5,
    )


def test_a_gate_that_is_off_exports_nothing(tmp_path):
    _, stacks = stacks_of_two(tiny_model("llama"))
    assert fixed_updates(stacks, torch.zeros(2)) == {}
    with pytest.raises(CheckpointError, match="no update to write"):
        write_lora(fixed_updates(stacks, torch.zeros(2)), tmp_path)


def test_only_one_chunks_decision_can_be_exported():
    _, stacks = stacks_of_two(tiny_model("llama"))
    many = Decision(torch.ones(2, 2), torch.tensor([9, 9]), torch.ones(2))
    with pytest.raises(AttachError, match="one decision, this one speaks of 2 chunks"):
        fixed_updates(stacks, many)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(AttachError, match="NaN or infinite gates"):
            fixed_updates(stacks, torch.tensor([1.0, bad]))


def test_singular_form_is_kept_bit_for_bit_when_it_is_filled_again():
    stack = ExpertStack(6, 5, [3])
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    stack.fill(0, Update(draw(5, 3), draw(3, 6)))
    first = stack.update_of(0)
    stack.fill(0, first)
    again = stack.update_of(0)
    assert torch.equal(first.u, again.u) and torch.equal(first.v, again.v)


def test_what_is_put_back_is_put_back_bit_for_bit_in_whatever_form():
    stack, update = ExpertStack(6, 5, [3]), Update(torch.randn(5, 3), torch.randn(3, 6))
    stack.put(0, update)
    again = stack.update_of(0)
    assert torch.equal(again.u, update.u) and torch.equal(again.v, update.v)
    with pytest.raises(AttachError, match="expert 0 has room for"):
        stack.put(0, Update(update.u[:, :2], update.v[:2]))
