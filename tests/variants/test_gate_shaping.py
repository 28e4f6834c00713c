"""V2: what the temperature does to attention, and what aligns the gates."""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Olmo2Config,
    Olmo2ForCausalLM,
)

import bem
from bem.adapters.checks import ARCHITECTURES, tiny_model
from bem.config import EVIDENCE_FEATURES
from bem.errors import AttachError
from bem.variants.base import Code
from bem.variants.gate_shaping import GateShapingV2, margin_alignment

N = len(EVIDENCE_FEATURES)
SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0,
)  # fmt: skip


def features(**values) -> torch.Tensor:
    return torch.tensor([[values.get(name, 0.0) for name in EVIDENCE_FEATURES]])


def other_model(name):
    torch.manual_seed(0)
    if name == "gemma3":  # norm per head, behind the exchange of heads and tokens
        return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8)).eval()
    return Olmo2ForCausalLM(Olmo2Config(**SMALL)).eval()  # one norm over all heads


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma3", "olmo2"])
@pytest.mark.parametrize("tokens", [4, 9])  # 4 tokens and 4 heads: shapes alone cannot tell them
def test_attention_is_the_softmax_of_logits_over_t_head_by_head(architecture, tokens):
    model = tiny_model(architecture) if architecture in ARCHITECTURES else other_model(architecture)
    eager = type(model)._from_config(model.config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    attached = bem.attach(eager, "v2", rank=4, chunk_size=8)
    attached.model.eval()
    ids = torch.arange(1, 1 + tokens)[None].repeat(2, 1)
    see = lambda e: attached.model(input_ids=ids, evidence=e, output_attentions=True).attentions  # noqa: E731
    layer = attached.base.bem_runtime.wiring.layer
    evidence = features(present=1.0, margin=0.5).repeat(2, 1)
    evidence[1] = 0
    with torch.no_grad():
        before = see(evidence)[layer]
        head = next(m for m in attached.modules() if isinstance(m, GateShapingV2)).head
        head.weight[:, EVIDENCE_FEATURES.index("margin")] = torch.tensor([4.0, -4.0, 1.0, 0.0])
        after = see(evidence)[layer]
    temperature = 0.5 + 1.5 / (1 + 2 * torch.exp(-torch.tensor([2.0, -2.0, 0.5, 0.0])))
    wanted = before[0].pow(1 / temperature[:, None, None])
    assert torch.allclose(after[0], wanted / wanted.sum(-1, keepdim=True), atol=1e-5)
    assert torch.equal(after[1], before[1])  # no evidence: T = 1, nothing moves
    assert (after[0] - before[0]).abs().max() > 1e-3


def test_keys_and_values_of_the_shaped_layer_stay_as_they_are():
    attached = bem.attach(tiny_model("llama"), "v2", rank=4)
    ids, layer = torch.arange(1, 10)[None], attached.base.bem_runtime.wiring.layer
    caches = []
    for evidence in (torch.zeros(1, N), torch.ones(1, N)):
        for module in attached.modules():
            if isinstance(module, GateShapingV2):
                module.head.weight.data.fill_(1.0)
        with torch.no_grad():
            out = attached.model(input_ids=ids, evidence=evidence, use_cache=True)
        caches.append(out)
    a, b = (c.past_key_values.layers[layer] for c in caches)
    assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    assert not torch.equal(caches[0].logits, caches[1].logits)


def test_temperature_is_one_at_start_and_stays_between_a_half_and_two():
    shaping = GateShapingV2(N, 4)
    code = Code(
        torch.zeros(1, 1, 8),
        None,
        torch.ones(1, 1, dtype=torch.long),
        torch.ones(1, 1, dtype=torch.bool),
        {"evidence": torch.rand(1, 1, N)},
    )
    assert torch.equal(shaping.control(code), torch.ones(1, 1, 4).double())
    with torch.no_grad():
        shaping.head.bias[:] = torch.tensor([100.0, -100.0, 0.0, math.log(2)])
    assert torch.allclose(1 / shaping.control(code), torch.tensor([2.0, 0.5, 1.0, 1.25]).double())


def test_alignment_is_the_squared_distance_of_mean_gate_and_margin_row_by_row():
    gates = torch.tensor([[[1.0, 1.4], [0.2, 0.2]], [[2.0, 2.0], [1.0, 1.0]]])  # means 1.2 .2 2 1
    evidence = torch.cat([features(present=1.0, margin=0.5), features(margin=0.9)])[:, None]
    evidence = evidence.expand(2, 2, N)
    real = torch.tensor([[True, False], [True, True]])  # the second slot of row 0 is empty
    loss = margin_alignment(gates, evidence, real, margin_scale=2.0)
    assert loss is not None and loss.item() == pytest.approx((1.2 - 1.0) ** 2 / 2)  # of two rows
    alone = margin_alignment(gates[:1], evidence[:1], real[:1], margin_scale=2.0)
    assert alone is not None and alone.item() / 2 == loss.item()
    both = margin_alignment(gates[:1], evidence[:1], torch.tensor([[True, True]]), 2.0)
    assert both is not None and both.item() == pytest.approx((0.2**2 + 0.8**2) / 2)  # means 1.2 .2
    assert margin_alignment(gates, torch.zeros(2, 2, N), real, 2.0) is None


def test_the_penalty_teaches_the_gates_to_follow_the_margin():
    attached = bem.attach(tiny_model("llama"), "v2", rank=4, alignment=1.0)
    attached.model.train()
    evidence = torch.cat([features(present=1.0, margin=m) for m in (0.1, 0.4, 0.6, 0.9)])
    ids = torch.arange(1, 13)[None].repeat(4, 1)
    optimizer = torch.optim.Adam(attached.parameters(), lr=0.05)
    for _ in range(250):
        attached.model(input_ids=ids, evidence=evidence)
        attached.penalty().backward()
        optimizer.step(), optimizer.zero_grad()
    attached.model.eval()
    with torch.no_grad():
        attached.model(input_ids=ids, evidence=evidence)
    gates = attached.gate_magnitude()
    assert torch.allclose(gates[:, -1], 2 * evidence[:, 2], atol=0.1)


def test_gates_are_one_at_birth_whatever_the_evidence():
    attached = bem.attach(tiny_model("llama"), "v2", rank=4)
    attached.model(input_ids=torch.arange(1, 9)[None], evidence=torch.rand(1, N))
    assert torch.equal(attached.gate_magnitude(), torch.ones(1, 8))


def test_other_variants_take_evidence_and_ignore_it():
    for variant in ("s0", "pt1", "v4"):
        attached = bem.attach(tiny_model("llama"), variant, rank=4)
        attached.model(input_ids=torch.arange(1, 9)[None], evidence=torch.rand(1, N))
        assert attached.n_evidence == 0
        attached.detach()


def test_evidence_of_a_wrong_shape_is_refused():
    attached = bem.attach(tiny_model("llama"), "v2", rank=4)
    with pytest.raises(AttachError, match="must be \\(batch, 8\\)"):
        attached.model(input_ids=torch.arange(1, 9)[None], evidence=torch.rand(1, N - 1))


def test_position_biases_on_the_logits_are_refused():
    sizes = dict(vocab_size=64, hidden_size=32, n_layer=4, n_head=4)
    with pytest.raises(AttachError, match="ALiBi"):
        bem.attach(BloomForCausalLM(BloomConfig(**sizes)), "v2", rank=4)


def test_an_unknown_fused_projection_is_refused_and_gates_alone_still_work():
    sizes = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    model = CodeGenForCausalLM(CodeGenConfig(**sizes)).eval()
    with pytest.raises(AttachError, match="temperature=False"):
        bem.attach(model, "v2", rank=4)
    fresh = AutoModelForCausalLM.from_config(CodeGenConfig(**sizes)).eval()
    assert bem.attach(fresh, "v2", rank=4, temperature=False).n_evidence == N


def test_the_blind_control_sees_no_evidence():
    ids = torch.arange(1, 12)[None]
    attached = bem.attach(tiny_model("llama"), "v2", rank=4, blind=True)
    for parameter in attached.parameters():
        parameter.data.normal_()
    with torch.no_grad():
        some = attached.model(input_ids=ids, evidence=torch.rand(1, N)).logits
        none = attached.model(input_ids=ids).logits
    assert torch.equal(some, none)


@pytest.mark.parametrize("bad", [[[float("nan")] * N], [[1.5] * N], [["high"] * N]])
def test_evidence_that_is_no_set_of_features_is_refused(bad):
    attached = bem.attach(tiny_model("llama"), "v2", rank=4)
    with pytest.raises(AttachError, match="evidence"):
        attached.model(input_ids=torch.arange(1, 9)[None], evidence=bad)


def test_plain_lists_are_evidence_too_and_every_prompt_needs_its_own():
    attached = bem.attach(tiny_model("llama"), "v2", rank=4)
    ids = torch.arange(1, 9)[None].repeat(2, 1)
    told = dict(max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(ids))
    assert attached.model.generate(input_ids=ids, evidence=[[0.5] * N] * 2, **told).shape[0] == 2
    with pytest.raises(AttachError, match="1 rows for 2 prompts"):
        attached.model.generate(input_ids=ids, evidence=[[0.5] * N], **told)
