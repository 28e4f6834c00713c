"""X-LoRA weighs every expert at every token by a classifier, as its paper says."""

import pytest
import torch

from bem.adapters.copies import with_shared_weights
from bem.config import TrainingConfig
from bem.errors import AttachError
from bem.experiments.routing.xlora import xlora
from bem.training.fit import fit
from tests.experiments.routing.lora_experts import rows, updates


def test_x_lora_weighs_the_experts_by_a_softmax_of_the_last_hidden_states(
    micro_llama, folders, ids
):
    with torch.no_grad():
        hidden = micro_llama(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        peer = xlora(micro_llama, folders, layerwise=False)
        (_, weight), (_, bias) = peer.named_parameters()
        peer.model(input_ids=ids)
        shares = peer.model.base_model.internal_xlora_scalings  # (batch, tokens, sites, experts)
    expected = (hidden @ weight.T + bias).softmax(-1)
    assert shares.shape == (2, 12, 2, 2)
    for site in range(2):
        assert torch.allclose(shares[:, :, site], expected, atol=1e-6)


def test_x_lora_with_all_weight_on_one_expert_is_that_lora(micro_llama, folders, ids):
    dense = with_shared_weights(micro_llama)
    with torch.no_grad():
        for site, update in updates(1).items():
            layer = dense.get_submodule(site)
            layer.weight = torch.nn.Parameter(layer.weight + update.u @ update.v)
        peer = xlora(micro_llama, folders, layerwise=False)
        (_, weight), (_, bias) = peer.named_parameters()
        weight.zero_()
        bias.copy_(torch.tensor([-1e4, 1e4]))
        assert torch.allclose(
            peer.model(input_ids=ids).logits, dense(input_ids=ids).logits, atol=1e-4
        )


def test_the_classifier_alone_gets_gradients(micro_llama, folders, ids):
    peer = xlora(micro_llama, folders)
    names = {name for name, _ in peer.named_parameters()}
    for _ in range(2):  # a forward pass must not unfreeze the experts
        peer.model(input_ids=ids).logits.pow(2).mean().backward()
        touched = {n for n, p in peer.model.named_parameters() if p.grad is not None}
        assert touched == names and len(names) == 2
    assert all(p.grad.abs().sum() > 0 for p in peer.parameters())


def test_fit_trains_the_classifier_and_leaves_the_experts(
    micro_llama, folders, tokenizer, tmp_path
):
    peer = xlora(micro_llama, folders)
    frozen = {n: p.clone() for n, p in peer.model.named_parameters() if not p.requires_grad}
    before = {n: t.clone() for n, t in peer.state_dict().items()}
    training = TrainingConfig(steps=4, batch_size=3)
    result = fit(peer, tokenizer, rows(), training, tmp_path / "run", 0)
    assert result.steps == 4 and result.losses[-1] < result.losses[0]
    assert all(not torch.equal(t, before[n]) for n, t in peer.state_dict().items())
    assert all(torch.equal(p, frozen[n]) for n, p in peer.model.named_parameters() if n in frozen)


def test_a_trained_classifier_is_restored_from_its_tensors_and_by_resuming(
    micro_llama, folders, tokenizer, tmp_path, ids
):
    other = with_shared_weights(micro_llama)
    peer, training = xlora(micro_llama, folders), TrainingConfig(steps=3, batch_size=3)
    fit(peer, tokenizer, rows(), training, tmp_path / "run", 0)
    again = xlora(other, folders)
    fit(again, tokenizer, rows(), training, tmp_path / "run", 0)  # nothing left to do: loads
    with torch.no_grad():
        logits = peer.model(input_ids=ids).logits
        assert torch.equal(again.model(input_ids=ids).logits, logits)
        fresh = xlora(again.detach(), folders, seed=1)
        assert not torch.equal(fresh.model(input_ids=ids).logits, logits)
        fresh.load_state_dict(peer.state_dict())
        assert torch.equal(fresh.model(input_ids=ids).logits, logits)
    with pytest.raises(AttachError, match="do not fit"):
        fresh.load_state_dict({})


def test_the_seed_decides_the_classifier(micro_llama, folders):
    first, same, other = (
        xlora(with_shared_weights(micro_llama), folders, seed=s).parameters()[0] for s in (3, 3, 4)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
