"""The step with the lowest loss on rows set aside is kept; a resumed run keeps the same one."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

import bem
from bem.config import TrainingConfig
from bem.errors import TrainingError
from bem.routing.mount import blank_expert, mount
from bem.training import early_stopping
from bem.training.data import Example, encode
from bem.training.early_stopping import validation_loss
from bem.training.fit import fit

WORDS = ["name", "the", "function", "that", "this", "docstring", "describes", "return", "value"]


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return [
        Example(str(i), " ".join(rng.choice(WORDS, 2 + i % 5)), (" ".join(WORDS[: 1 + i % 4]),))
        for i in range(16)
    ]


def config(**changes):
    values = {"steps": 8, "batch_size": 4, "learning_rate": 0.01, "checkpoint_every": 3}
    return TrainingConfig(**{**values, "patience": 2, "evaluate_every": 2, **changes})


@pytest.fixture
def losses(monkeypatch):
    """What every look at the validation rows is told, in order."""
    told: list[float] = []
    monkeypatch.setattr(early_stopping, "validation_loss", lambda *_: told.pop(0))
    return told


def trained(micro_llama, tokenizer, rows, folder, **changes):
    attached = bem.attach(micro_llama, "s0")
    result = fit(attached, tokenizer, rows[:12], config(**changes), folder, 0, validation=rows[12:])
    return attached, result


def test_it_stops_after_so_many_looks_and_goes_back_to_the_lowest(
    micro_llama, tokenizer, rows, tmp_path, losses
):
    losses += [3.0, 2.0, 2.5, 2.5]
    attached, result = trained(micro_llama, tokenizer, rows, tmp_path / "a", steps=20)
    assert (result.steps, result.best_step, result.kept_step) == (8, 4, 4)
    assert result.validation == [(2, 3.0), (4, 2.0), (6, 2.5), (8, 2.5)]
    kept = {name: t.clone() for name, t in attached.state_dict().items()}
    model = attached.detach()
    other = bem.attach(model, "s0")
    fit(other, tokenizer, rows[:12], config(steps=20, patience=None), tmp_path / "b", 0, until=4)
    assert all(torch.equal(kept[name], tensor) for name, tensor in other.state_dict().items())


def test_the_last_step_is_looked_at_and_equal_losses_keep_the_first(
    micro_llama, tokenizer, rows, tmp_path, losses
):
    losses += [2.0, 2.0, 1.0]
    attached, result = trained(micro_llama, tokenizer, rows, tmp_path / "a", steps=5)
    assert result.validation == [(2, 2.0), (4, 2.0), (5, 1.0)] and result.best_step == 5
    attached.detach()
    losses += [2.0, 2.0, 2.0]
    _, result = trained(micro_llama, tokenizer, rows, tmp_path / "b", steps=5)
    assert result.best_step == 2


def test_a_training_cut_in_two_is_the_training_in_one(
    micro_llama, tokenizer, rows, tmp_path, losses
):
    looks = [3.0, 2.0, 2.5, 2.6]
    losses += looks
    attached, whole = trained(micro_llama, tokenizer, rows, tmp_path / "whole")
    at_once = {name: t.clone() for name, t in attached.state_dict().items()}
    attached.detach()
    losses += looks
    for until in (5, None):
        attached = bem.attach(micro_llama, "s0")
        result = fit(
            attached, tokenizer, rows[:12], config(), tmp_path / "cut", 0,
            validation=rows[12:], until=until,
        )  # fmt: skip
        after = attached.state_dict()
        if until is None:
            assert all(torch.equal(at_once[name], tensor) for name, tensor in after.items())
        attached.detach()
    assert (result.validation, result.best_step) == (whole.validation, whole.best_step)


@pytest.mark.parametrize("at", [2, 6])
def test_an_interrupt_between_a_step_and_its_look_loses_no_look(
    micro_llama, tokenizer, rows, tmp_path, losses, at
):
    """Also at the last step, which is looked at in any case."""
    losses += [3.0, 2.0, 1.0]
    attached = bem.attach(micro_llama, "s0")

    def stop(result):
        if result.step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            attached, tokenizer, rows[:12], config(steps=6), tmp_path, 0, stop, validation=rows[12:]
        )
    attached.detach()
    _, result = trained(micro_llama, tokenizer, rows, tmp_path, steps=6)
    assert result.validation == [(2, 3.0), (4, 2.0), (6, 1.0)]


def test_a_loss_that_is_no_number_is_never_the_lowest(
    micro_llama, tokenizer, rows, tmp_path, losses
):
    losses += [math.nan, 5.0, math.nan]
    _, result = trained(micro_llama, tokenizer, rows, tmp_path, steps=6)
    assert result.best_step == 4


def test_a_finished_training_is_finished_and_may_be_asked_for_again(
    micro_llama, tokenizer, rows, tmp_path, losses
):
    losses += [2.0, 3.0, 3.0]
    attached, first = trained(micro_llama, tokenizer, rows, tmp_path)
    again = fit(attached, tokenizer, rows[:12], config(), tmp_path, 0, validation=rows[12:])
    assert (again.steps, again.best_step) == (first.steps, first.best_step) == (6, 2)


@pytest.mark.parametrize("variant", ["s0", "pt1", "v1", "v2", "v3", "v4", "experts"])
def test_looking_changes_nothing_of_the_training(
    micro_llama, tokenizer, rows, tmp_path, variant, monkeypatch
):
    """Whatever an adapter keeps for inference, a look in the middle must not stay in the way."""
    falling = iter([3.0, 2.0, 1.0, 0.5])
    monkeypatch.setattr(
        early_stopping, "validation_loss", lambda *a: validation_loss(*a) * 0 + next(falling)
    )
    after = []
    for patience in (None, 1):
        attached, given = _made(micro_llama, variant, rows)
        settings = config(patience=patience, evaluate_every=1, steps=4)
        folder = tmp_path / str(patience)
        with attached.training("experts") if variant == "experts" else nullcontext():
            fit(attached, tokenizer, given[:12], settings, folder, 0, validation=given[12:])
            after.append({name: t.clone() for name, t in attached.state_dict().items()})
        attached.detach()
    assert all(torch.equal(after[0][name], tensor) for name, tensor in after[1].items())


def _made(model, variant, rows):
    if variant != "experts":
        return bem.attach(model, variant), rows
    routes = [{"route": [1 + i % 2]} for i in range(len(rows))]
    given = [replace(row, meta=route) for row, route in zip(rows, routes, strict=True)]
    return mount(model, [blank_expert(model, name, 2) for name in "ab"]), given


def test_the_loss_is_the_mean_over_rows_of_their_last_answers(micro_llama, tokenizer, rows):
    """Against transformers' own loss, row by row."""
    attached = bem.attach(micro_llama, "s0")
    encoded = [encode(row, tokenizer, 99) for row in rows[:5]]
    by_hand = []
    for row in encoded:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        with torch.no_grad():
            by_hand.append(float(attached.model(input_ids=ids, labels=labels).loss))
    loss = validation_loss(attached, tokenizer, encoded, batch_size=2)
    assert loss == pytest.approx(np.mean(by_hand), abs=1e-5)


def test_patience_without_rows_is_an_error(micro_llama, tokenizer, rows, tmp_path):
    attached = bem.attach(micro_llama, "s0")
    with pytest.raises(TrainingError, match="patience 2 needs validation rows"):
        fit(attached, tokenizer, rows, config(), tmp_path, 0)
