"""A basis is accepted where the base tells the two kinds of prompts apart, and refused where it does not."""

import random

import pytest
import torch

import bem
from bem.errors import SafetyError
from bem.safety.basis import read_basis
from bem.safety.fit import FitOptions, fit_basis
from bem.safety.protect import protect
from tests.conftest import make_llama, make_tokenizer

FEW = FitOptions(blocks=(1, 2), keep=1, directions=2, kl_limit=100.0)
WORDS = (["knife", "alarm", "harm"], ["bread", "table", "seven"])


def prompts(kind, n, seed):
    """Six words each, of which one in five is the other kind's: nothing tells them apart without fail."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(WORDS[kind ^ (rng.random() < 0.2)]) for _ in range(6)) for _ in range(n)
    ]


RED, BLUE = prompts(0, 100, 0), prompts(1, 100, 1)
CATEGORIES = [str(i % 3) for i in range(100)]


@pytest.fixture(scope="module")
def fitted():
    return fit_basis(make_llama(), make_tokenizer(), RED, BLUE, FEW, CATEGORIES)


def test_prompts_that_differ_make_a_basis_with_its_evidence(fitted, tmp_path):
    assert len(fitted.layers) == 1 and fitted.layers[0].directions.shape == (32, 2)
    assert (fitted.layers[0].low <= fitted.layers[0].high).all()
    tried = fitted.about["tried"]
    assert [t["block"] for t in tried] == [1, 2]
    best = max(tried, key=lambda t: t["held_out_auroc"][0])
    assert best["held_out_auroc"][0] > best["best_of_random"] and best["held_out"] == [40, 40]
    assert set(fitted.about["harmless_kl"]) == {"0.3", "0.6", "1.0"}
    assert read_basis(fitted.write(tmp_path / "b")).about == fitted.about


def test_it_guards_the_base_it_was_made_for(fitted):
    attached = bem.attach(make_llama(), "s0", router_layer=0)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.normal_()
    assert max(protect(attached, fitted).check().values()) < 1e-5


def test_prompts_that_do_not_differ_make_none():
    same = prompts(1, 100, 2)
    with pytest.raises(SafetyError, match="not above the best random"):
        fit_basis(make_llama(), make_tokenizer(), same, BLUE, FEW)


def test_a_clamp_that_changes_harmless_prompts_too_much_is_not_accepted():
    strict = FitOptions(blocks=(2,), keep=1, directions=2, kappa=1.0, kl_limit=1e-9)
    with pytest.raises(SafetyError, match="nats per token"):
        fit_basis(make_llama(), make_tokenizer(), RED, BLUE, strict)


def test_the_same_seed_makes_the_same_basis_and_the_model_stays(fitted):
    model = make_llama()
    before = model(torch.arange(3, 20)[None]).logits
    again = fit_basis(model, make_tokenizer(), RED, BLUE, FEW, CATEGORIES)
    assert again.digest == fitted.digest
    assert torch.equal(model(torch.arange(3, 20)[None]).logits, before)


def test_an_adapted_model_and_few_prompts_are_refused():
    attached = bem.attach(make_llama(), "s0")
    with pytest.raises(SafetyError, match="bare base"):
        fit_basis(attached.model, make_tokenizer(), RED, BLUE)
    with pytest.raises(SafetyError, match="at least 20"):
        fit_basis(make_llama(), make_tokenizer(), RED[:5], BLUE)
