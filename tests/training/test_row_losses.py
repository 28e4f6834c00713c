"""Losses behind prompts that were read before are those of rows that are read whole."""

import pytest
import torch

import bem
from bem.adapters import checks_probe as probe
from bem.config import EVIDENCE_FEATURES
from bem.training.answers import greedy_decoded
from bem.training.data import Example, encode
from bem.training.row_losses import answer_losses, losses_behind
from tests.conftest import make_llama
from tests.engine.test_engine import lively
from tests.routing.mounted import mounted

EVIDENCE = tuple(0.1 * i for i in range(1, 1 + len(EVIDENCE_FEATURES)))


def made(variant: str):
    model = make_llama(initializer_range=0.2)
    if variant.startswith("router"):
        return lively(mounted(model))
    if variant == "s0":
        return probe.perturbed(bem.attach(model, variant, rank=4))
    return probe.perturbed(bem.attach(model, variant, rank=4, chunk_size=8))


def examples(variant: str) -> list[Example]:
    return [
        Example(
            str(n),
            "name the function " * n,
            ("return the value " * (4 - n),),
            history=(("this docstring", "describes"),),
            relevance=EVIDENCE if variant == "v2" else (),
            meta={"route": [n, 3 - n]} if variant == "router, given" else {},
        )
        for n in (3, 1, 2)
    ]


def read(variant: str, tokenizer, length: int = 400):
    """(adapted, prompts, wholes, what was decoded)."""
    adapted = made(variant)
    adapted.model.eval()
    rows = examples(variant)
    prompts = [encode(row, tokenizer, length, with_answer=False) for row in rows]
    wholes = [encode(row, tokenizer, length) for row in rows]
    return adapted, prompts, wholes, greedy_decoded(adapted.model, tokenizer, prompts, 11)


@pytest.mark.parametrize("variant", ["s0", "pt1", "v1", "v2", "v4", "router", "router, given"])
def test_they_are_those_of_rows_that_are_read_whole(variant, tokenizer):
    adapted, prompts, wholes, decoded = read(variant, tokenizer)
    losses, gates = losses_behind(adapted, decoded, prompts, wholes, 0)
    expected, expected_gates = answer_losses(adapted, wholes, 0)
    assert losses == pytest.approx(expected, abs=2e-4)
    assert (gates[0] is None) == (expected_gates[0] is None)
    if gates[0] is not None:
        assert gates == pytest.approx(expected_gates, abs=1e-5)


def test_a_row_that_is_cut_elsewhere_than_its_prompt_is_read_whole(tokenizer):
    longest = max(len(encode(row, tokenizer, 400)) for row in examples("s0"))
    adapted, prompts, wholes, decoded = read("s0", tokenizer, length=longest - 2)
    assert any(
        row.input_ids[: row.prompt_length] != p.input_ids
        for row, p in zip(wholes, prompts, strict=True)
    )
    assert losses_behind(adapted, decoded, prompts, wholes, 0) is None
    assert torch.isfinite(torch.tensor(answer_losses(adapted, wholes, 0)[0])).all()
