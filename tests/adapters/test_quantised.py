"""Quantised bases: attached, trained, saved and named like any other, or refused by name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import bem
from bem.adapters.budget import price
from bem.adapters.copies import with_shared_weights, without_adapter
from bem.adapters.quantised import dense_weight, is_quantised
from bem.adapters.version import base_digest, base_identity
from bem.config import AdapterConfig, TrainingConfig
from bem.errors import AttachError, BaseMismatch
from bem.experiments.measuring.memory import added_memory, weight_bytes
from bem.training.answers import greedy_answers
from bem.training.data import Example, encode
from bem.training.trainer import Trainer
from tests.conftest import make_llama

IDS = torch.arange(1, 25)[None]


def torchao_int8(model, kind="Int8WeightOnlyConfig"):
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed", exc_type=ImportError
    )

    def in_a_block(module, name):  # float8 makes nan of the head's row of zeros, that of <pad>
        return isinstance(module, nn.Linear) and "layers" in name

    quantization.quantize_(model, getattr(quantization, kind)(), filter_fn=in_a_block)
    return model


def bitsandbytes(model, bits, packs=False):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def made(linear):
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        if bits == 8:
            new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*shape, quant_type="nf4", compute_dtype=torch.float32)
            new.support_avx512bf16_for_cpu = packs
        new.load_state_dict(linear.state_dict())
        return new.requires_grad_(False).to("cpu")

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            model.set_submodule(name, made(module))
    return model.eval()


QUANTISED = {
    "torchao int8": torchao_int8,
    "torchao float8": lambda m: torchao_int8(m, "Float8WeightOnlyConfig"),
    "torchao intx": lambda m: torchao_int8(m, "IntxWeightOnlyConfig"),
    "bitsandbytes int8": lambda m: bitsandbytes(m, 8),
    "bitsandbytes nf4": lambda m: bitsandbytes(m, 4),
}


@pytest.fixture(params=QUANTISED)
def quantised(request):
    """Makes one and the same quantised base again and again."""
    return lambda **changes: QUANTISED[request.param](make_llama(hidden_size=64, **changes))


def rows(tokenizer, n=8):
    words = ["name", "the", "function", "that", "this"]
    made = [Example(str(i), " ".join(words[i % 4 :]), (words[i % 3],)) for i in range(n)]
    return [encode(each, tokenizer, 64) for each in made]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("variant", ["s0", "v1", "v3", "v4"])
def test_it_is_attached_trained_saved_and_loaded(quantised, tokenizer, tmp_path, variant):
    base = quantised()
    before, digest = logits(base), base_digest(base)
    attached = bem.attach(base, variant, rank=4)
    torch.testing.assert_close(logits(attached.model), before)  # the identity at birth
    config = TrainingConfig(steps=12, learning_rate=0.02, warmup=0.0)
    trainer = Trainer(attached, tokenizer, config, seed=0)
    losses = [trainer.step(rows(tokenizer)).loss for _ in range(12)]
    assert losses[-1] < losses[0]
    assert base_digest(base) == digest  # and the base stays
    trained = logits(attached.model.eval())
    assert not torch.allclose(trained, before)
    attached.save(tmp_path)
    again = bem.load(quantised(), tmp_path)
    assert again.version == attached.version
    assert torch.equal(logits(again.model), trained)
    assert torch.equal(logits(attached.detach()), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bem_tiny_in_int8_learns_and_answers_the_same_after_loading(dtype, tmp_path):
    def base():
        model, tokenizer = bem.load_base("bem-tiny", dtype=dtype)
        return torchao_int8(model), tokenizer

    model, tokenizer = base()
    words = ["name", "value", "items", "path"]
    made = [Example(w, f"def {w}(self):", (f"the {w}",)) for w in words]
    learnt = [encode(row, tokenizer, 64) for row in made]
    attached = bem.attach(model, "v1", rank=8)
    config = TrainingConfig(steps=30, learning_rate=0.02, warmup=0.0)
    trainer = Trainer(attached, tokenizer, config, seed=0)
    losses = [trainer.step(learnt).loss for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]
    attached.model.eval()
    prompts = [encode(row, tokenizer, 64, with_answer=False) for row in made]
    answers = greedy_answers(attached.model, tokenizer, prompts, 12)
    attached.save(tmp_path)
    again = bem.load(base()[0], tmp_path)
    assert greedy_answers(again.model, tokenizer, prompts, 12) == answers


def test_a_gradient_is_that_of_the_same_base_dequantised(quantised, tokenizer):
    base = quantised()
    plain = make_llama(hidden_size=64)
    modules = dict(base.named_modules())
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            weight = nn.Parameter(dense_weight(modules[name], base).clone())
            module.weight = weight  # the head is tied to the embeddings, which stay as they are
    config = TrainingConfig(learning_rate=0.01, clip=1e9)
    found = []
    for model in (base, plain):
        attached = bem.attach(model, "s0", rank=4)
        for p in attached.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        found.append(Trainer(attached, tokenizer, config, seed=0).step(rows(tokenizer)))
    # bitsandbytes' int8 rounds the layers' inputs too
    assert found[0].loss == pytest.approx(found[1].loss, rel=2e-3)
    assert found[0].grad_norm == pytest.approx(found[1].grad_norm, rel=5e-2)


def test_sizes_and_prices_are_those_of_the_layers_not_of_packed_weights(quantised):
    base, plain = quantised(), make_llama(hidden_size=64)
    assert is_quantised(base.model.layers[0].mlp.down_proj)
    assert not is_quantised(plain.model.layers[0].mlp.down_proj)
    for variant in ("s0", "v1", "v3", "v4"):
        config = AdapterConfig(variant=variant, rank=4)
        there = price(plain, config)
        assert price(base, config) == there == bem.attach(quantised(), config).price()
    down = dense_weight(base.model.layers[0].mlp.down_proj, base)
    original = plain.model.layers[0].mlp.down_proj.weight.detach()
    assert down.shape == original.shape
    assert float((down - original).norm() / original.norm()) < 0.15  # nf4 and int8 are coarse
    relative = bem.attach(base, "s0", rank=4, trust_radius=0.1, trust_relative=True)
    radii = [m.radius for m in relative.modules()]
    assert all(r == pytest.approx(0.1 * float(original.norm()), rel=0.3) for r in radii[1::2])


def test_the_digest_is_that_of_what_was_quantised(quantised, tmp_path):
    base = quantised()
    digest = base_digest(base)
    assert digest == base_digest(quantised()) != base_digest(make_llama(hidden_size=64))
    logits(base)  # bitsandbytes moves its scales in the first pass
    assert base_digest(base) == digest == base_digest(with_shared_weights(base))
    assert base_identity(base).dtype.startswith("float32")
    weight = base.model.layers[3].mlp.down_proj.weight
    with torch.no_grad():
        getattr(weight, "qdata", weight)[0, 0] = 3
    assert base_digest(base) != digest  # one number of one layer


def test_memory_is_that_of_the_integers_and_the_adapter(quantised):
    base, plain = quantised(), make_llama(hidden_size=64)
    layers = sum(p.numel() for n, p in plain.named_parameters() if n.endswith("proj.weight"))
    others = weight_bytes(plain) - 4 * layers
    assert layers / 2 <= weight_bytes(base) - others < 1.5 * layers  # of 4 bytes each
    attached = bem.attach(with_shared_weights(base), "v1", rank=2)
    own = 4 * sum(p.numel() for p in attached.parameters())
    assert weight_bytes(attached.model) == weight_bytes(base) + own
    work = {"prompt_tokens": 16, "new_tokens": 2}
    (added,) = added_memory({"v1": attached}, base, **work).values()
    assert own <= added < weight_bytes(base)


def test_an_adapter_of_the_unquantised_base_is_refused(quantised, tmp_path):
    bem.attach(make_llama(hidden_size=64), "s0", rank=2).save(tmp_path)
    with pytest.raises(BaseMismatch, match="made for a base"):
        bem.load(quantised(), tmp_path)


def test_loras_are_mounted_on_it_and_the_contract_of_the_cache_holds(quantised, tmp_path):
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        made = get_peft_model(make_llama(hidden_size=64), settings)
        for p in made.parameters():
            if p.requires_grad:
                p.data = 0.1 * torch.randn(p.shape)
        made.save_pretrained(tmp_path / name)
    base = quantised()
    plain = logits(base)
    mounted = bem.mount(base, [tmp_path / "a", tmp_path / "b"], chunk_size=8)
    route = torch.tensor([[0] * 8 + [1] * 8 + [2] * 8])
    with torch.no_grad():
        whole = mounted.model(IDS, route=route).logits
        torch.testing.assert_close(whole[:, :8], plain[:, :8], atol=1e-4, rtol=0)
        assert not torch.allclose(whole[:, 9:], plain[:, 9:], atol=1e-2)
        cache, pieces = None, []
        for at in (0, 8, 16):
            out = mounted.model(
                IDS[:, at : at + 8], route=route[:, at : at + 8], past_key_values=cache
            )
            cache = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-3, rtol=0)


def test_a_copy_on_the_same_weights_takes_nothing_away_from_the_base(quantised):
    """Made before either of them was run."""
    base = quantised()
    copy = with_shared_weights(base)
    assert torch.equal(logits(copy), logits(base)) and torch.equal(
        logits(base), logits(quantised())
    )
    assert weight_bytes(copy) == weight_bytes(base)


def test_a_copy_of_the_base_without_the_adapter_answers_as_the_base(quantised):
    base = quantised()
    before = logits(base)
    attached = bem.attach(base, "v1", rank=4)
    for p in attached.parameters():
        p.data += 0.1
    assert torch.equal(logits(without_adapter(attached)), before)


# ------------------------------------------------------------------------------------- what is refused


def test_four_bits_that_will_be_packed_for_inference_are_refused():
    words = r"quantised bitsandbytes Linear4bit \(Params4bit\) that is packed anew.*first pass"
    with pytest.raises(AttachError, match=words):
        bem.attach(bitsandbytes(make_llama(), 4, packs=True), "s0", rank=2)


def test_weights_whose_inputs_are_quantised_too_are_refused():
    base = torchao_int8(make_llama(), "Int8DynamicActivationInt8WeightConfig")
    words = (
        r"quantised torch Linear \(Int8Tensor\) whose output has no gradient.*weight-only.*bfloat16"
    )
    with pytest.raises(AttachError, match=words):
        bem.attach(base, "s0", rank=2)
    assert not getattr(base, "peft_config", None)


class QuantLinear(nn.Module):
    """A layer as GPTQ and AWQ have it: packed integers in buffers, no `weight`."""

    def __init__(self, linear, learns):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().max() / 7
        steps = (linear.weight / scale).round().to(torch.int32) + 8
        packed = sum(steps[:, i::8] << (4 * i) for i in range(8))
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scale.detach()[None])
        self.learns = learns

    def forward(self, x):
        parts = [(self.qweight >> (4 * i)) & 15 for i in range(8)]
        weight = (torch.stack(parts, -1).flatten(1) - 8) * self.scales
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            return nn.functional.linear(x, weight)


def packed(learns):
    model = make_llama()
    for block in model.model.layers:
        block.mlp.down_proj = QuantLinear(block.mlp.down_proj, learns)
    return model


def test_packed_modules_without_a_gradient_are_refused_by_name():
    words = (
        r"layers\.0\.mlp\.down_proj is a quantised tests QuantLinear whose output has no gradient"
    )
    with pytest.raises(AttachError, match=words):
        bem.attach(packed(learns=False), "s0", rank=2)


def test_packed_modules_through_which_gradients_pass_are_adapted_and_named(tokenizer):
    base = packed(learns=True)
    digest = base_digest(base)
    attached = bem.attach(base, "s0", rank=2)
    steps = Trainer(attached, tokenizer, TrainingConfig(learning_rate=0.02), seed=0)
    losses = [steps.step(rows(tokenizer)).loss for _ in range(8)]
    assert losses[-1] < losses[0] and base_digest(base) == digest
    with torch.no_grad():  # the lowest of eight packed weights: float32 would round it away
        attached.base.get_submodule("model.layers.0.mlp.down_proj").qweight[0, 0] ^= 1
    assert base_digest(base) != digest
