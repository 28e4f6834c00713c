"""Penalties and bounds act wherever an adapter is trained, or the training is refused."""

import copy
import inspect

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import tiny_model
from bem.errors import TrainingError

ROW = {"input_ids": torch.arange(24) + 5, "labels": torch.arange(24) + 5}


class Rows(Dataset):
    def __init__(self, **columns):
        self.row = {**ROW, **columns}

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return self.row


def train(model, tmp_path, data=None, **settings):
    arguments = TrainingArguments(
        **{
            **dict(output_dir=str(tmp_path), max_steps=3, learning_rate=0.5, report_to=[]),
            **dict(save_strategy="no", use_cpu=True, disable_tqdm=True, optim="sgd"),
            **settings,
        }
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data or Rows())
    trainer.train()
    return trainer


def norm_of(update):
    return float(torch.linalg.matrix_norm(update.scale * update.u @ update.v))


# --- bounds ----------------------------------------------------------------------------------------


def test_a_spectral_cap_holds_after_trainer(tmp_path):
    attached = bem.attach(tiny_model("llama"), "v3", rank=2, spectral_cap=0.1)
    train(attached.model, tmp_path, learning_rate=3.0)
    sigmas = [m.sigma() for m in attached.modules()]
    assert max(sigmas) > 0.05 and all(s <= 0.1 * (1 + 1e-3) for s in sigmas)


def test_a_trust_radius_holds_after_every_step_of_any_optimiser():
    attached = bem.attach(tiny_model("llama"), "s0", rank=4, trust_radius=0.2)
    attached.model.train()
    optimizer = torch.optim.AdamW(attached.parameters(), lr=0.3)
    for _ in range(3):
        attached.model(input_ids=probe.token_ids(), labels=probe.token_ids()).loss.backward()
        optimizer.step()
        norms = [norm_of(m) for m in attached.modules()]
        assert max(norms) > 0.1 and all(n <= 0.2 + 1e-6 for n in norms)


def test_bounds_hold_in_a_model_that_peft_loaded_and_in_a_copy(tmp_path):
    import peft

    bem.attach(tiny_model("llama"), "v3", rank=2, spectral_cap=0.1).save(tmp_path / "a")
    wrapped = peft.PeftModel.from_pretrained(
        tiny_model("llama"), str(tmp_path / "a"), is_trainable=True
    )
    for model in (wrapped, copy.deepcopy(wrapped)):
        train(model, tmp_path / "out", learning_rate=3.0)
        assert all(m.sigma() <= 0.1 * (1 + 1e-3) for m in bem.from_peft(model).modules())


def test_another_models_optimiser_moves_nothing_here():
    attached = probe.perturbed(bem.attach(tiny_model("llama"), "s0", rank=4, trust_radius=0.01))
    before = {n: p.clone() for n, p in attached.named_parameters()}
    other = torch.nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    assert all(torch.equal(p, before[n]) for n, p in attached.named_parameters())


# --- the penalty -----------------------------------------------------------------------------------


def shaped(**settings):
    attached = probe.perturbed(
        bem.attach(tiny_model("llama"), "v2", rank=4, chunk_size=8, decorrelation=0.3, **settings)
    )
    attached.model.train()
    return attached


def losses(attached, **given):
    known = probe.evidence_for(attached.model, 2)
    whole = attached.model(input_ids=probe.token_ids(), labels=probe.token_ids(), **known, **given)
    bare = attached.model(input_ids=probe.token_ids(), **known, **given)
    logits = whole.logits[:, :-1].flatten(0, 1)
    nll = torch.nn.functional.cross_entropy(logits, probe.token_ids()[:, 1:].flatten())
    return whole, bare, nll, attached.penalty()


def test_the_models_own_loss_holds_the_penalty():
    whole, _, nll, penalty = losses(shaped())
    assert penalty > 1e-3 and torch.allclose(whole.loss, nll + penalty, atol=1e-5)


def test_a_penalty_that_a_loss_holds_is_not_handed_out_again():
    attached = shaped()
    whole = attached.model(
        input_ids=probe.token_ids(),
        labels=probe.token_ids(),
        **probe.evidence_for(attached.model, 2),
    )
    assert attached.penalty() == 0
    tuple_out = attached.model(
        input_ids=probe.token_ids(),
        labels=probe.token_ids(),
        return_dict=False,
        **probe.evidence_for(attached.model, 2),
    )
    assert torch.allclose(tuple_out[0], whole.loss)


def test_no_penalty_is_added_while_nothing_is_learned():
    attached = shaped()
    with torch.no_grad():
        frozen = attached.model(
            input_ids=probe.token_ids(),
            labels=probe.token_ids(),
            **probe.evidence_for(attached.model, 2),
        )
    attached.model.eval()
    known = probe.evidence_for(attached.model, 2)
    assert torch.equal(
        attached.model(input_ids=probe.token_ids(), labels=probe.token_ids(), **known).loss,
        frozen.loss,
    )


def test_the_passes_of_one_step_add_up_to_one_penalty():
    attached = shaped()
    known = probe.evidence_for(attached.model, 2)
    items = 4 * (probe.token_ids().shape[1] - 1)  # two passes of two rows
    once = attached.model(input_ids=probe.token_ids(), labels=probe.token_ids(), **known)
    part = attached.model(
        input_ids=probe.token_ids(), labels=probe.token_ids(), num_items_in_batch=items, **known
    )
    assert torch.allclose(2 * part.loss, once.loss, atol=1e-5)


def test_a_step_that_forgot_the_penalty_is_refused_before_it_is_taken():
    attached = shaped()
    optimizer = torch.optim.SGD(attached.parameters(), lr=1.0)
    before = {n: p.clone() for n, p in attached.named_parameters()}
    attached.model(
        input_ids=probe.token_ids(), **probe.evidence_for(attached.model, 2)
    ).logits.sum().backward()
    with pytest.raises(TrainingError, match=r"penalty .* is in no loss"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in attached.named_parameters())
    logits = attached.model(
        input_ids=probe.token_ids(), **probe.evidence_for(attached.model, 2)
    ).logits
    (logits.sum() + attached.penalty()).backward()
    optimizer.step()


def test_a_variant_without_penalties_needs_no_labels():
    attached = bem.attach(tiny_model("llama"), "v2", rank=4, alignment=0.0)
    before = {name: p.detach().clone() for name, p in attached.named_parameters()}
    attached.model.train()
    attached.model(input_ids=probe.token_ids()).logits.sum().backward()
    torch.optim.SGD(attached.parameters(), lr=0.1).step()
    assert any(not torch.equal(p, before[name]) for name, p in attached.named_parameters())


def test_trainer_trains_on_the_penalty(tmp_path):
    data = Rows(
        evidence=torch.tensor([1.0, 0.9, 0.2] + [0.5] * 5),
        labels=torch.full((24,), -100).index_fill(0, torch.tensor([23]), 5),
    )
    means = []
    for alignment in (0.0, 30.0):
        attached = bem.attach(tiny_model("llama"), "v2", rank=4, chunk_size=8, alignment=alignment)
        train(attached.model, tmp_path, data, max_steps=20, learning_rate=0.05, optim="adamw_torch")
        with torch.no_grad():
            attached.model(input_ids=ROW["input_ids"][None], evidence=data.row["evidence"][None])
        means.append(float(attached.gate_magnitude()[0, 9:].mean()))
    assert means[0] > 0.8 and abs(means[1] - 0.4) < 0.1  # margin .2, times 2


# --- columns ---------------------------------------------------------------------------------------


def test_trainer_hands_on_the_columns_that_an_adapter_reads(tmp_path):
    attached, seen = bem.attach(tiny_model("llama"), "v2", rank=4, chunk_size=8), []
    attached.base.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True, prepend=True
    )
    columns = {"evidence": torch.ones(8) / 2, "turn_starts": torch.zeros(24, dtype=torch.bool)}
    train(attached.model, tmp_path, Rows(**columns, note=torch.ones(1)), max_steps=1)
    assert {"evidence", "turn_starts"} <= seen[0] and "note" not in seen[0]


def test_the_forward_pass_names_its_columns_and_all_that_the_base_takes():
    model = tiny_model("llama")
    before = inspect.signature(model.forward)
    attached = bem.attach(model, "v2", rank=4)
    names = list(inspect.signature(attached.base.forward).parameters)
    assert set(before.parameters) | {
        "turn_starts",
        "evidence",
        "conditioning",
        "route",
        "vision",
    } == set(names)
    assert names[-1] == list(before.parameters)[-1]  # **kwargs stays last: Trainer looks for it
    attached.detach()
    assert inspect.signature(model.forward) == before and "forward" not in model.__dict__


def test_a_forward_that_was_put_in_place_before_is_called_and_comes_back():
    model, calls = tiny_model("llama"), []
    own = model.forward

    def before(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = before
    attached = bem.attach(model, "s0", rank=2)
    attached.model(input_ids=probe.token_ids())
    assert calls and attached.detach().forward is before


# --- frozen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["s0", "v1", "v2"])
def test_training_what_was_loaded_frozen_names_the_way_out(tmp_path, variant):
    bem.attach(tiny_model("llama"), variant, rank=2).save(tmp_path / "saved")
    model = bem.load(tiny_model("llama"), tmp_path / "saved").model
    with pytest.raises(TrainingError, match="trainable=True"):
        train(model, tmp_path)
    batch = {"input_ids": ROW["input_ids"][None], "labels": ROW["labels"][None]}
    model.train()
    with pytest.raises(TrainingError, match=r"model\.eval\(\)"):
        model(**batch)
    with torch.no_grad():
        assert model(**batch).loss > 0
    assert model.eval()(**batch).loss > 0
