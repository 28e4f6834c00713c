"""A stack adds exactly what its experts add, in either form, for each row its own."""

import copy

import peft
import pytest
import torch

import bem
from bem.adapters.budget import price_of
from bem.adapters.build import Parts
from bem.adapters.checks import _ids, _logits, _perturbed
from bem.adapters.checks_models import tiny_model
from bem.errors import AttachError, CheckpointError
from bem.experts.compose import Decision, TrustRegion
from bem.experts.expert import Update, expert_of, write_lora
from bem.experts.stack import GATHER_ABOVE, ExpertStack, fixed_updates
from bem.experts.subspace import orthogonality_error, reserve

D_IN, D_OUT, RANKS = 10, 12, (3, 0, 5, 4)


def updates_of(ranks=RANKS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [Update(draw(D_OUT, rank), draw(rank, D_IN)) for rank in ranks]


def filled(form="dense", ranks=RANKS, **settings):
    stack = ExpertStack(D_IN, D_OUT, ranks, form, **settings)
    for expert, update in enumerate(updates_of(ranks)):
        stack.fill(expert, update)
    return stack


def gates_to_control(stack, gates):
    """Control per token that follows the gates: (..., E) -> (..., R)."""
    return gates[..., stack.owner]


def data(*lead, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*lead, D_OUT, generator=generator),
        torch.randn(*lead, D_IN, generator=generator),
    )


MIXES = {
    "one expert for all": [[[0, 0, 1.0, 0]] * 3] * 2,
    "each row another": [[[1.0, 0, 0, 0]] * 3, [[0, 0, 0, 0.5]] * 3],
    "each token another, some none": [
        [[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2.0, 0]],
        [[0, 1.0, 0, 0], [0, 0, 0, 1.0], [1.0, 0, 0, 0]],
    ],
    "several at once": [[[1.0, 0.3, -0.5, 2.0]] * 3, [[0, 0, 0.1, 0.2]] * 3],
    "none": [[[0.0, 0, 0, 0]] * 3] * 2,
}


@pytest.fixture(params=["dense", "gathered, few tokens", "gathered, many tokens"])
def form(request, monkeypatch):
    """Each way of multiplying: gathering differs for few tokens and for many."""
    if request.param.endswith("many tokens"):
        monkeypatch.setattr("bem.experts.stack.FEW_TOKENS", 0)
    return request.param.split(",")[0]


@pytest.mark.parametrize("mix", list(MIXES))
def test_it_adds_the_gated_sum_of_its_experts(form, mix):
    stack, (y, x), gates = filled(form), data(2, 3), torch.tensor(MIXES[mix])
    deltas = torch.stack([update.u @ update.v for update in updates_of()])
    wanted = y + torch.einsum("bte,eoi,bti->bto", gates, deltas, x)
    kept = y.clone()
    found = stack.update(y, x, gates_to_control(stack, gates))
    assert torch.allclose(found, wanted, atol=1e-4)
    assert torch.equal(y, kept)  # the frozen layer's output is left alone
    flat = stack.update(
        y.flatten(0, 1), x.flatten(0, 1), gates_to_control(stack, gates).flatten(0, 1)
    )
    assert torch.allclose(flat, wanted.flatten(0, 1), atol=1e-4)  # tokens flattened, as OPT does


@pytest.mark.parametrize("mix", [m for m in MIXES if m != "none"])
def test_both_forms_have_the_same_gradients(form, mix):
    gates, grads = torch.tensor(MIXES[mix]), []
    for kind in ("dense", form):
        stack, (y, x) = filled(kind), data(2, 3)
        control = gates_to_control(stack, gates).requires_grad_()
        for tensor in (y, x):
            tensor.requires_grad_()
        stack.update(y, x, control).square().sum().backward()
        # a block that nobody uses has a gradient at its zero gate in the dense form alone
        at_work = control.grad * (control != 0)
        grads.append((stack.u.grad, stack.v.grad, y.grad, x.grad, at_work))
    for dense, other in zip(*grads, strict=True):
        assert torch.allclose(dense, other, rtol=1e-4, atol=1e-2)


def test_auto_stays_dense_where_the_gates_want_a_gradient():
    stack, (y, x) = filled("auto"), data(2, 3)
    stack.gathered = True  # as it is for a large one
    control = torch.zeros(2, 3, 12, requires_grad=True)
    stack.update(y, x, control).sum().backward()
    assert control.grad.abs().min() > 0


def test_a_masked_rank_inside_a_used_block_stays_out(form):
    y, x = data(1, 4)
    control = torch.zeros(1, 4, 12)
    control[..., 4] = 2.0  # the second rank of expert 2 alone
    dense = filled("dense").update(y, x, control)
    assert torch.allclose(filled(form).update(y, x, control), dense, atol=1e-5)


@pytest.mark.parametrize("lead", [(2,), (2, 1)])  # tokens flattened, and not
def test_the_blocks_in_use_are_kept_while_a_chunk_is_decoded(lead, monkeypatch):
    stack, (y, x) = filled("gathered"), data(*lead)
    control = gates_to_control(stack, torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]]))
    lookups, real = [], stack._experts_used
    monkeypatch.setattr(stack, "_experts_used", lambda c: lookups.append(c) or real(c))
    with torch.no_grad():
        for _ in range(5):  # each call gets another view of one control
            stack.update(y, x, control.view(*lead, 12))
    assert len(lookups) == 1


@torch.no_grad()
def test_they_are_looked_up_again_when_the_control_or_the_weights_change():
    stack, (y, x) = filled("gathered"), data(2, 1)
    control = gates_to_control(stack, torch.tensor([[[1.0, 0, 0, 0]], [[0, 0, 1.0, 0]]]))
    dense = filled("dense")
    for _ in range(2):  # decoding: the same control for every token of a chunk
        assert torch.allclose(stack.update(y, x, control), dense.update(y, x, control), atol=1e-5)
    control[1] = gates_to_control(stack, torch.tensor([0, 0, 0, 1.0]))
    assert torch.allclose(stack.update(y, x, control), dense.update(y, x, control), atol=1e-5)
    for either in (stack, dense):
        either.fill(3, updates_of(seed=9)[3])  # an expert is replaced while a chunk runs
    assert torch.allclose(stack.update(y, x, control), dense.update(y, x, control), atol=1e-5)
    for either in (stack, dense):
        either.clear(0)
    assert torch.allclose(stack.update(y, x, control), dense.update(y, x, control), atol=1e-5)
    for either in (stack, dense):
        either.half().float()  # other values, perhaps at the old address
    assert torch.allclose(stack.update(y, x, control), dense.update(y, x, control), atol=1e-5)
    with torch.inference_mode():
        again = control * 2
        assert torch.allclose(stack.update(y, x, again), dense.update(y, x, again), atol=1e-4)


def test_bfloat16_tokens_meet_float32_experts(form):
    stack, (y, x) = filled(form), data(2, 3)
    control = gates_to_control(stack, torch.tensor(MIXES["several at once"]))
    found = stack.update(y.bfloat16(), x.bfloat16(), control.bfloat16())
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), stack.update(y, x, control), rtol=0.05, atol=0.3)


def test_empty_batches_and_stacks_without_ranks_work(form):
    stack = filled(form)
    y, x = data(0, 3)
    assert stack.update(y, x, torch.zeros(0, 3, 12)).shape == (0, 3, D_OUT)
    none = ExpertStack(D_IN, D_OUT, [0, 0], form)
    y, x = data(2, 3)
    assert torch.equal(none.update(y, x, torch.zeros(2, 3, 0)), y)
    none.fill(0, Update(torch.zeros(D_OUT, 0), torch.zeros(0, D_IN)))
    assert none.control_width == 0 and none.flops().per_token == 0


def test_64_experts_of_64_ranks_work_in_every_form(form):
    y, x = data(2, 3)
    control = torch.zeros(2, 3, 4096)
    control[0, :, 64:128], control[1, :, 4032:] = 1.0, 0.5
    dense = ExpertStack(D_IN, D_OUT, [64] * 64, "dense")
    torch.nn.init.normal_(dense.u)
    other = copy.deepcopy(dense)
    other.form, other.gathered = form, form == "gathered"
    assert torch.allclose(
        other.update(y, x, control), dense.update(y, x, control), rtol=1e-4, atol=1e-3
    )


def test_a_long_prefill_gathers_whole_chunks_and_scattered_tokens():
    y, x = data(2, 200)
    which = torch.tensor([0, 2, 0, 3]).repeat_interleave(50)  # expert 0 comes back: two runs
    gates = torch.eye(4)[torch.stack([which, which])]
    control = gates_to_control(filled(), gates)
    dense = filled("dense").update(y, x, control)
    assert torch.allclose(filled("gathered").update(y, x, control), dense, atol=1e-4)
    one = filled("gathered").update(y[:1], x[:1], control[:1])
    assert torch.allclose(one, dense[:1], atol=1e-4)


def test_a_new_stack_changes_nothing():
    stack, (y, x) = ExpertStack(D_IN, D_OUT, RANKS), data(2, 3)
    assert torch.equal(stack.update(y, x, torch.ones(2, 3, 12)), y)


def test_filling_leaves_the_product_and_orders_the_ranks_by_singular_value():
    stack = filled()
    for expert, update in enumerate(updates_of()):
        start, stop = stack.spans[expert]
        product = update.u.double() @ update.v.double()
        kept = stack.update_of(expert)
        assert torch.allclose(kept.u.double() @ kept.v.double(), product, atol=1e-5)
        values = torch.linalg.svdvals(product)[: stop - start].float()
        assert torch.allclose(stack.importance[start:stop], values, atol=1e-4)
        assert torch.allclose(kept.u.norm(dim=0), values, atol=1e-4)  # each rank carries its own
        assert torch.allclose(kept.v @ kept.v.T, torch.eye(stop - start), atol=1e-5)


def test_an_update_with_more_ranks_than_the_layer_has_is_stored_whole():
    stack = ExpertStack(4, 3, [6])
    u, v = torch.randn(3, 6), torch.randn(6, 4)
    stack.fill(0, Update(u, v))
    kept = stack.update_of(0)
    assert torch.allclose(kept.u @ kept.v, u @ v, atol=1e-5)
    assert stack.importance[3:].tolist() == [0.0] * 3


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
        stack.u.add_(torch.randn(D_OUT, 12))
    before = [stack.update_of(e) for e in range(4)]
    stack.canonicalise()
    for expert, update in enumerate(before):
        kept, (start, stop) = stack.update_of(expert), stack.spans[expert]
        assert torch.allclose(kept.u @ kept.v, update.u @ update.v, atol=1e-4)
        values = torch.linalg.svdvals(update.u @ update.v)[: stop - start]
        assert torch.allclose(stack.importance[start:stop], values, atol=1e-4)


def test_an_untrained_expert_can_still_learn_after_it_was_brought_into_canonical_form():
    stack, (y, x) = ExpertStack(D_IN, D_OUT, [3, 2], "dense"), data(2, 3)
    stack.canonicalise()
    stack.update(y, x, torch.ones(2, 3, 5)).square().sum().backward()
    assert stack.u.grad.abs().sum(0).min() > 0


def test_a_cleared_expert_is_gone_and_the_others_are_not():
    stack, (y, x) = filled(), data(2, 3)
    others = gates_to_control(stack, torch.tensor([1.0, 1.0, 0.0, 1.0])).expand(2, 3, -1)
    before = stack.update(y, x, others)
    stack.clear(2)
    everything = torch.ones(2, 3, 12)
    assert torch.allclose(stack.update(y, x, everything), before, atol=1e-5)
    assert stack.importance[3:8].tolist() == [0.0] * 5


def test_a_stack_waits_for_a_decision():
    with pytest.raises(AttachError, match="a router decides"):
        filled().control(None)


@torch.no_grad()
def test_a_copy_and_a_saved_state_give_the_same_numbers(form):
    stack, (y, x) = filled(form), data(2, 3)
    control = torch.ones(2, 3, 12)
    stack.update(y, x, control)  # it may keep something now
    fresh = ExpertStack(D_IN, D_OUT, RANKS, form)
    fresh.load_state_dict(stack.state_dict())
    for other in (copy.deepcopy(stack), fresh):
        assert torch.equal(other.update(y, x, control), stack.update(y, x, control))
        assert torch.equal(other.importance, stack.importance)


def test_the_form_follows_from_the_weights_of_all_experts_together():
    edge = GATHER_ABOVE // (D_IN + D_OUT)
    assert not ExpertStack(D_IN, D_OUT, [edge]).gathered
    assert ExpertStack(D_IN, D_OUT, [edge, 1]).gathered
    assert not ExpertStack(D_IN, D_OUT, [edge, 1], "dense").gathered
    assert ExpertStack(D_IN, D_OUT, [1], "gathered").gathered


def test_the_price_is_all_ranks_if_dense_and_the_largest_expert_if_gathered():
    assert filled("dense").flops().per_token == 2 * 12 * (D_IN + D_OUT)
    gathered = filled("gathered")
    assert gathered.flops().per_token == 2 * 5 * (D_IN + D_OUT)
    assert gathered.flops().per_chunk == 0
    gathered.region = TrustRegion(1.0)
    assert gathered.flops().per_chunk == 2 * 12 * 12
    gathered.region = TrustRegion(1.0, "spectral")
    assert gathered.flops().per_chunk == 2 * 12**3
    with torch.device("meta"):  # priced without being made
        assert price_of({"site": Parts(filled_on_meta())}).parameters == 12 * (D_IN + D_OUT)


def filled_on_meta():
    return ExpertStack(D_IN, D_OUT, RANKS)


# --- reserved directions ------------------------------------------------------------------------


def test_reserved_experts_stay_orthogonal_through_training():
    stack, (y, x) = ExpertStack(D_IN, D_OUT, [3, 0, 4, 5], "dense"), data(4, 6)
    assert stack.reserve(reserve(D_OUT, [3, 0, 4, 5], seed=0)) == [0.0] * 4
    optimizer = torch.optim.AdamW([stack.u, stack.v], lr=0.1)
    for _ in range(5):
        loss = (stack.update(y, x, torch.ones(4, 6, 12)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stack.after_step()
    assert stack.u.abs().max() > 0.1  # it did learn
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
    attached = _perturbed(bem.attach(tiny_model("llama"), "s0", rank=3, router_layer=1))
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
            lambda m, args, y, s=stack, c=control: s.update(y, args[0], c.expand(*y.shape[:-1], -1))
        )
    updates = fixed_updates(stacks, decision, region)
    assert {len(update.v) for update in updates.values()} == {4}  # the rank budget
    write_lora(updates, tmp_path)
    served = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    with torch.no_grad():
        assert torch.allclose(_logits(served, _ids()), _logits(live, _ids()), atol=1e-5)


def test_one_expert_alone_is_exported_as_itself(tmp_path):
    attached, stacks = stacks_of_two(tiny_model("llama"))
    write_lora(fixed_updates(stacks, torch.tensor([1.0, 0.0])), tmp_path)
    served = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert torch.allclose(_logits(served, _ids()), _logits(attached.model, _ids()), atol=1e-5)


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


def test_singular_form_is_kept_bit_for_bit_when_it_is_filled_again():
    stack = ExpertStack(6, 5, [3])
    generator = torch.Generator().manual_seed(0)
    stack.fill(
        0, Update(torch.randn(5, 3, generator=generator), torch.randn(3, 6, generator=generator))
    )
    first = stack.update_of(0)
    stack.fill(0, first)
    again = stack.update_of(0)
    assert torch.equal(first.u, again.u) and torch.equal(first.v, again.v)
