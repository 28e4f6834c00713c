"""PEFT's methods are measured like any arm, are saved whole, and leave nothing behind."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from bem.adapters.copies import with_shared_weights
from bem.adapters.lora import WEIGHTS, write_lora
from bem.adapters.version import base_digest
from bem.errors import AttachError, BaseMismatch, CheckpointError
from bem.experiments.measuring.answers import measure
from bem.experiments.measuring.latency import measure_latency
from bem.experiments.routing.arms import PEERS
from bem.experiments.routing.arrow import arrow
from bem.experiments.routing.peer import load_peer
from bem.experiments.routing.xlora import xlora
from tests.experiments.routing.lora_experts import task, updates


def test_turn_starts_evidence_and_routes_are_dropped(make, micro_llama, folders, ids):
    peer = make(micro_llama, folders)
    starts, evidence = torch.zeros_like(ids).bool(), torch.zeros(2, 8)
    given = dict(turn_starts=starts, evidence=evidence, route=torch.zeros_like(ids))
    with torch.no_grad():
        assert torch.equal(peer.model(input_ids=ids, **given).logits, peer.model(ids).logits)
    settings = dict(max_new_tokens=3, do_sample=False)
    said = peer.model.generate(input_ids=ids, **given, **settings)
    assert torch.equal(said, peer.model.generate(input_ids=ids, **settings))


def test_experts_change_the_base_and_detaching_gives_it_back_bit_for_bit(
    make, micro_llama, folders, ids
):
    micro_llama.model.norm.weight.requires_grad = False
    trainable = {name: p.requires_grad for name, p in micro_llama.named_parameters()}
    weights = {name: tensor.clone() for name, tensor in micro_llama.state_dict().items()}
    with torch.no_grad():
        before = micro_llama(input_ids=ids).logits
        peer = make(micro_llama, folders)
        assert (peer.model(input_ids=ids).logits - before).abs().max() > 1e-3
        peer.model.generate(input_ids=ids, max_new_tokens=2)
        with peer.model.disable_adapter():
            assert torch.equal(peer.model(input_ids=ids).logits, before)
        assert (peer.model(input_ids=ids).logits - before).abs().max() > 1e-3
        back = peer.detach()
        assert back is micro_llama and torch.equal(back(input_ids=ids).logits, before)
    assert {name: p.requires_grad for name, p in back.named_parameters()} == trainable
    assert back.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in back.state_dict().items())
    assert back.config.use_cache and not getattr(back, "peft_config", None)
    make(back, folders)  # and can be used again


def test_decoding_by_hand_equals_generate(make, micro_llama, folders, ids):
    model = make(micro_llama, folders).model
    said = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        output, by_hand = model(input_ids=ids, use_cache=True), ids
        for _ in range(4):
            token = output.logits[:, -1:].argmax(-1)
            by_hand = torch.cat([by_hand, token], 1)
            cache = output.past_key_values
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            assert output.logits.shape[1] == 1
    assert torch.equal(by_hand, said)


@pytest.mark.parametrize("kind", PEERS)
def test_a_saved_peer_comes_back_with_its_settings(micro_llama, folders, tmp_path, ids, kind):
    options = {"arrow": dict(top_k=2, temperature=0.5), "xlora": dict(layerwise=False, top_k=1)}
    peer = PEERS[kind](with_shared_weights(micro_llama), folders, **options[kind])
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 1
        peer.save(tmp_path / "saved", data_hash="d")
        again = load_peer(with_shared_weights(micro_llama), tmp_path / "saved", tmp_path, PEERS)
        assert torch.equal(again.model(ids).logits, peer.model(ids).logits)
    assert again.config == peer.config
    manifest = json.loads((tmp_path / "saved/manifest.json").read_text())
    assert manifest["base"] == base_digest(micro_llama) and manifest["data"] == "d"


def test_a_saved_peer_is_refused_on_another_base_with_other_experts_or_changed_weights(
    make, micro_llama, folders, tmp_path
):
    make(with_shared_weights(micro_llama), folders).save(tmp_path / "saved")
    other = with_shared_weights(micro_llama)
    other.model.norm.weight = torch.nn.Parameter(other.model.norm.weight * 2)
    with pytest.raises(BaseMismatch, match="made for a base"):
        load_peer(other, tmp_path / "saved", tmp_path, PEERS)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        load_peer(micro_llama, tmp_path / "nowhere", tmp_path, PEERS)
    write_lora(updates(9), folders["b"])
    with pytest.raises(CheckpointError, match=r"b: adapter_model\.safetensors was changed"):
        load_peer(micro_llama, tmp_path / "saved", tmp_path, PEERS)
    write_lora(updates(1), folders["b"])
    (tmp_path / "saved/classifier.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"classifier\.safetensors was changed"):
        load_peer(micro_llama, tmp_path / "saved", tmp_path, PEERS)


def test_making_a_peer_uses_up_nobody_elses_random_numbers(make, micro_llama, folders):
    torch.manual_seed(7)
    make(micro_llama, folders)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)


def test_a_peer_is_measured_like_an_adapter_and_only_arrow_reuses_its_cache(
    micro_llama, folders, tokenizer
):
    hits = {}
    for name, make in PEERS.items():
        peer = make(with_shared_weights(micro_llama), folders)
        one, three = (measure(peer, tokenizer, task(), batch_size=b) for b in (1, 3))
        assert one.metrics["em"].tolist() == three.metrics["em"].tolist()
        assert one.metrics["loss"] == pytest.approx(three.metrics["loss"], abs=1e-4)
        assert one.adapter_parameters == peer.price().parameters
        hits[name] = sum(one.kv_hits) / sum(one.kv_needed)
    assert hits == {"arrow": 1.0, "xlora": 0.0}


def test_prices_count_every_expert_and_x_lora_pays_a_second_pass(micro_llama, folders):
    experts = 2 * 4 * (32 + 32 + 64 + 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        micro_llama(input_ids=torch.zeros((1, 512), dtype=torch.long), logits_to_keep=1)
    base = counter.get_total_flops() / 512
    cheap = arrow(with_shared_weights(micro_llama), folders).price()
    dear = xlora(with_shared_weights(micro_llama), folders).price()
    assert cheap.parameters == experts
    assert dear.parameters == experts + (32 + 1) * 2 * 2  # two sites, two experts
    products = 2 * experts  # V and U of every expert
    prototypes, mixing = 2 * 2 * (32 + 64), 2 * 2 * (32 + 32)
    assert cheap.flops_per_token == products + prototypes + mixing
    # X-LoRA computes its experts in both passes
    assert dear.flops_per_token == pytest.approx(base + 2 * products + 2 * 32 * 4, rel=1e-6)


def test_latency_is_timed_beside_a_plain_model(micro_llama, folders):
    arms = {name: make(with_shared_weights(micro_llama), folders) for name, make in PEERS.items()}
    timed = measure_latency(
        {"base": micro_llama, **arms}, rounds=2, prompt_tokens=16, new_tokens=3, clock="cpu"
    )
    assert set(timed.p50_ms) == {"base", "arrow", "xlora"}
    assert all(t > 0 for phases in timed.p50_ms.values() for t in phases.values())


def test_a_record_says_what_a_peer_was_made_of(make, micro_llama, folders):
    peer = make(micro_llama, folders)
    dumped = peer.config.model_dump()
    assert list(dumped["experts"]) == ["a", "b"] and len(set(dumped["experts"].values())) == 2
    assert dumped["kind"] == make.__name__


def test_experts_that_cannot_be_routed_are_refused_with_the_reason(
    make, micro_llama, folders, tmp_path
):
    with pytest.raises(AttachError, match="at least two experts"):
        make(micro_llama, {"a": folders["a"]})
    with pytest.raises(AttachError, match="top_k 3"):
        make(micro_llama, folders, top_k=3)
    with pytest.raises(CheckpointError, match="missing"):
        make(micro_llama, {**folders, "c": tmp_path / "nowhere"})
    make(micro_llama, folders)
    with pytest.raises(AttachError, match="already carries"):
        make(micro_llama, folders)


def test_arrow_refuses_experts_of_other_ranks_and_x_lora_takes_them(
    micro_llama, folders, tmp_path, ids
):
    mixed = {**folders, "wide": write_lora(updates(2, rank=6), tmp_path / "wide")}
    assert len(load_file(mixed["wide"] / WEIGHTS)) == 4
    with pytest.raises(AttachError, match="a and wide differ"):
        arrow(micro_llama, mixed)
    assert torch.isfinite(xlora(micro_llama, mixed).model(input_ids=ids).logits).all()
