"""No adapter writes into a guarded basis, whatever it is, does or learns; the clamp is the last word."""

import pytest
import torch
from torch.nn.functional import normalize

import bem
from bem.adapters.copies import shadow
from bem.adapters.peft_method import adapters_of
from bem.errors import AttachError, BaseMismatch, SafetyError
from bem.online.penalties import proximal_step
from bem.safety.directions import coordinates
from bem.safety.knob import Knob
from bem.safety.protect import Clamp, protect
from bem.variants.base import Adapter
from tests.conftest import make_llama
from tests.routing.mounted import mounted
from tests.safety.guarded import VARIANTS, make_basis, random_adapter

IDS = torch.arange(3, 40)[None]


def worst(attached, basis, draws=4) -> float:
    """max ||P^T dW x|| / ||dW x|| over writers, random inputs and random controls; FiLM included."""
    layers = {site.name: (site.layer, site.role) for site in attached.plan.sites.found}
    found = 0.0
    for site, parts in adapters_of(attached.base, attached.name):
        layer, role = layers[site]
        forbidden = basis.forbidden(layer)
        if forbidden is None:
            continue
        for _ in range(draws):
            deltas = []
            if parts.update is not None and role in ("attn_out", "mlp_down"):
                d_in = attached.base.get_submodule(site).base_layer.in_features
                width = parts.update.control_width
                control = 3 * torch.randn(1, width) if width else None
                deltas.append(
                    parts.update.update(torch.zeros(1, 5, 32), torch.randn(1, 5, d_in), control, None)
                )  # fmt: skip
            if parts.film is not None:
                h = torch.randn(1, 5, 32)
                deltas.append(parts.film.modulate(h, torch.randn(1, 64), None) - h)
            for delta in deltas:
                inside = (delta.double() @ forbidden.basis).norm(dim=-1)
                found = max(found, float((inside / delta.double().norm(dim=-1)).max()))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_whatever_the_control_nothing_is_written_into_the_basis(variant, seed):
    attached = random_adapter(variant, seed)
    basis = make_basis(attached.base)
    assert worst(attached, basis) > 0.05  # or the test would prove nothing
    protect(attached, basis)
    assert worst(attached, basis) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_stays_so_after_every_step_of_any_optimiser(variant):
    attached = random_adapter(variant, **({"alignment": 0.0} if variant == "v2" else {}))
    basis = make_basis(attached.base)
    guard = protect(attached, basis)
    attached.model.train()
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        steps = optimizer(attached.parameters(), lr=0.1)
        for _ in range(2):
            steps.zero_grad()
            attached.model(input_ids=IDS, labels=IDS).loss.backward()
            steps.step()
            guard.check()
    with torch.no_grad():
        assert worst(attached, basis) <= 1e-5


@pytest.mark.parametrize("variant", ["s0", "v1"])
def test_it_stays_so_after_loading_a_state(variant):
    attached = random_adapter(variant)
    foreign = {n: t.clone() for n, t in random_adapter(variant, seed=3).state_dict().items()}
    guard = protect(attached, make_basis(attached.base))
    attached.load_state_dict(foreign)
    guard.check()


def test_a_state_of_its_own_comes_back_bit_for_bit():
    attached = random_adapter("v1")
    protect(attached, make_basis(attached.base))
    kept = {n: t.clone() for n, t in attached.state_dict().items()}
    attached.load_state_dict(kept)
    assert all(torch.equal(t, kept[n]) for n, t in attached.state_dict().items())


def test_a_write_past_the_guard_is_found():
    attached = random_adapter("s0")
    guard = protect(attached, make_basis(attached.base))
    with torch.no_grad():
        attached.modules()[0].u.add_(1.0)
    with pytest.raises(SafetyError, match="into the safety basis"):
        guard.check()
    attached.after_step()
    guard.check()


def test_a_shadow_is_protected_as_it_trains():
    attached = random_adapter("s0")
    basis = make_basis(attached.base)
    protect(attached, basis)
    second = shadow(attached)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(torch.randn_like(parameter))
        second.after_step()
        assert worst(second, basis) <= 1e-5


def test_mounted_experts_and_their_sums_write_nothing_into_it():
    routed = mounted(make_llama())
    basis = make_basis(routed.base)
    assert worst_of_packs(routed, basis) > 0.05
    guard = protect(routed, basis)
    assert worst_of_packs(routed, basis) <= 1e-5
    assert tuple(e.digest for e in routed.experts) == routed.pack.expert_digests
    twin = routed.shadow()
    with twin.training("experts"):
        steps = torch.optim.SGD([p for _, p in twin.named_parameters()], lr=1.0)
        twin.model(input_ids=IDS, labels=IDS, route=torch.ones_like(IDS)).loss.backward()
        steps.step()
    routed.adopt(twin)
    guard.check()
    assert worst_of_packs(routed, basis) <= 1e-5


@torch.no_grad()
def worst_of_packs(routed, basis) -> float:
    """The same for any sum of experts, from what acts."""
    layers = {site.name: (site.layer, site.role) for site in routed.plan.sites.found}
    found = 0.0
    for site, pack in zip(routed.pack.sites, routed.pack.members, strict=True):
        layer, role = layers[site]
        forbidden = basis.forbidden(layer)
        if forbidden is None or role not in ("attn_out", "mlp_down"):
            continue
        delta = (pack.u @ torch.randn(pack.control_width, 6)).double()
        found = max(found, float((forbidden.basis.T @ delta).norm() / delta.norm()))
    return found


def test_reserved_directions_and_the_basis_hold_together():
    from bem.experts.stack import ExpertStack
    from bem.experts.subspace import reserve
    from bem.variants.forbidden import Forbidden

    stack, p = ExpertStack(8, 32, (4, 4)), Forbidden(torch.linalg.qr(torch.randn(32, 2)).Q)
    with torch.no_grad():
        for u in stack.u.values():
            u.normal_()
    stack.reserve(reserve(32, (8, 8), 0))
    stack.protect(p)
    one, other = (stack.update_of(e).u.double() for e in (0, 1))
    assert p.leak(one) < 1e-6 and p.leak(other) < 1e-6 and float(one.norm()) > 0.1
    assert float((one.T @ other).abs().max()) < 1e-5


# --- the clamp ------------------------------------------------------------------------------------


def behind(attached, block, ids=IDS):
    """Hidden states behind a block, after everything."""
    kept = []
    module = attached.base.get_submodule(attached.plan.sites.blocks[block])
    handle = module.register_forward_hook(lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out))  # fmt: skip
    attached.model(input_ids=ids)
    handle.remove()
    return kept[0]


def lowest(attached, basis, index=1) -> float:
    layer = basis.layers[index]
    h = behind(attached, layer.block).double()
    return float(coordinates(h, layer.directions.double())[0].min())


@torch.no_grad()
def test_kappa_zero_changes_no_bit_and_a_guard_can_be_taken_off():
    attached = random_adapter("v4")
    guard = protect(attached, make_basis(attached.base))
    on = attached.model(input_ids=IDS).logits
    guard.knob.move(1.0, "ada", "test")
    assert not torch.equal(attached.model(input_ids=IDS).logits, on)
    guard.release()
    protect(attached, make_basis(attached.base)).release()
    bare = random_adapter("s0")
    before = bare.model(input_ids=IDS).logits
    for parts in adapters_of(bare.base, bare.name):
        assert parts[1].update.forbidden is None
    assert torch.equal(bare.model(input_ids=IDS).logits, before)
    held = protect(bare, make_basis(bare.base))
    zero = bare.model(input_ids=IDS).logits
    held.release()
    assert torch.equal(bare.model(input_ids=IDS).logits, zero)


@pytest.mark.parametrize("kappa", [0.1, 0.5, 1.0])
@torch.no_grad()
def test_no_coordinate_lies_below_its_floor_behind_the_clamp(kappa):
    attached = random_adapter("v4")
    basis = make_basis(attached.base)
    guard = protect(attached, basis)
    assert lowest(attached, basis) < 0
    with guard.knob.raised(kappa):
        assert lowest(attached, basis) >= 2.0 * kappa - 1e-4  # low 0, high 2
    assert lowest(attached, basis) < 0


@torch.no_grad()
def test_what_is_written_grows_with_kappa_and_only_into_the_basis():
    basis = make_basis(make_llama())
    layer, knob = basis.layers[0], Knob()
    clamp, h = Clamp(layer, knob, ""), torch.randn(2, 5, 32)
    u, last = layer.directions, (h @ layer.directions)
    for kappa in (0.01, 0.2, 0.6, 1.0):
        with knob.raised(kappa):
            out = clamp(layer.block, h)
        assert (out @ u - last).min() >= -1e-5
        assert torch.allclose(out - (out @ u) @ u.T, h - (h @ u) @ u.T, atol=1e-5)
        last = out @ u
    with knob.raised(torch.tensor([0.0, 1.0])):  # a row each
        out = clamp(layer.block, h)
    assert torch.equal(out[0], h[0]) and not torch.equal(out[1], h[1])


@torch.no_grad()
def test_inflating_the_state_gains_nothing():
    basis = make_basis(make_llama())
    layer, knob = basis.layers[0], Knob(level=0.5)
    clamp = Clamp(layer, knob, "")
    outside = torch.randn(1, 4, 32)
    outside = outside - (outside @ layer.directions) @ layer.directions.T
    shares = []
    for size in (1.0, 1e3):
        out = clamp(layer.block, normalize(outside, dim=-1) * size)
        shares.append(normalize(out, dim=-1) @ layer.directions)
    assert torch.allclose(shares[0], shares[1], atol=1e-5) and shares[0].min() > 0.1


def test_an_expert_trained_to_cancel_the_basis_cannot():
    """Full gradient access: the loss is the coordinate itself, and the state's inverse share of it."""
    attached = random_adapter("s0", rank=16)
    basis = make_basis(attached.base)
    guard = protect(attached, basis, Knob(level=0.4, floor=0.4))
    layer = basis.layers[1]
    u = layer.directions
    steps = torch.optim.Adam(attached.parameters(), lr=0.05)
    for _ in range(15):
        steps.zero_grad()
        h = behind(attached, layer.block)
        (normalize(h, dim=-1) @ u).sum().backward()
        steps.step()
    guard.check()
    with torch.no_grad():
        assert lowest(attached, basis) >= 0.8 - 1e-4


def test_weights_that_no_optimiser_moved_are_settled_too():
    attached = random_adapter("s0")
    guard = protect(attached, make_basis(attached.base))
    weights = dict(attached.named_parameters())
    pulls = {name: torch.randn_like(w) for name, w in weights.items()}
    proximal_step(
        weights, pulls, rate=0.1, accepted={n: w.clone() for n, w in weights.items()}, pull=0.0
    )
    guard.check()


def test_kappas_for_another_batch_and_a_second_adapter_are_refused():
    attached = random_adapter("s0")
    guard = protect(attached, make_basis(attached.base))
    with guard.knob.raised(torch.tensor([0.1, 0.2])), pytest.raises(SafetyError, match="2 kappas"):
        attached.model(input_ids=IDS)
    attached.model.add_adapter("other", bem.BemConfig(variant="s0", task_type="CAUSAL_LM"))
    with pytest.raises(SafetyError, match="'other'"):
        guard.check()


# --- refusals -------------------------------------------------------------------------------------


def test_what_acts_is_another_version_under_a_guard_and_the_checkpoint_is_not(tmp_path):
    attached = random_adapter("s0")
    basis = make_basis(attached.base)
    guard = protect(attached, basis, Knob(level=0.2))
    guarded = attached.version
    assert guarded != attached.own_version
    guard.knob.move(0.3, "ada", "incident")
    assert attached.version != guarded
    attached.save(tmp_path / "saved")
    assert bem.load(make_llama(), tmp_path / "saved").version == attached.own_version
    guard.release()
    assert attached.version == attached.own_version


def test_another_base_and_a_second_guard_are_refused():
    attached = random_adapter("s0")
    basis = make_basis(attached.base)
    with pytest.raises(BaseMismatch, match="fitted for base"):
        protect(attached, type(basis)("0" * 64, basis.layers, {}))
    protect(attached, basis)
    with pytest.raises(SafetyError, match="guarded already"):
        protect(attached, basis)


def test_a_variant_that_does_not_say_how_it_writes_cannot_be_protected():
    class Strange(Adapter):
        def update(self, y, x, control, slot):
            return y

        def flops(self):
            raise NotImplementedError

    with pytest.raises(AttachError, match="override `writers`"):
        Strange().protect(make_basis(make_llama()).forbidden(0))
    Strange().after_step()  # unprotected it needs none


def test_a_norm_behind_the_writers_is_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    attached = bem.attach(Gemma2ForCausalLM(config).eval(), "s0")
    with pytest.raises(SafetyError, match="a norm behind"):
        protect(attached, make_basis(attached.base))
