"""A kappa of a request's own: it acts on its rows alone, and its blocks are nobody else's."""

import pytest
import torch
from transformers import GenerationConfig

from bem.engine.engine import Engine
from bem.engine.request import Request
from bem.errors import EngineError
from bem.safety.knob import Knob
from bem.safety.protect import clamp_bare, protect
from tests.conftest import make_llama
from tests.engine.plain import plain, prompts
from tests.routing.mounted import mounted
from tests.safety.guarded import make_basis, random_adapter

NEW = 12


def subject(kind: str, knob: Knob):
    adapted = random_adapter(kind) if kind != "router" else mounted(make_llama())
    protect(adapted, make_basis(adapted.base, high=40.0), knob)
    return adapted


def first_logprob(adapted, ids) -> float:
    """Of the likeliest first token, by `generate` without the engine."""
    adapted.base.generation_config.eos_token_id = None
    settings = GenerationConfig(do_sample=False, max_new_tokens=1, pad_token_id=0)
    out = adapted.model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        generation_config=settings,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return float(out.logits[0][0].float().log_softmax(-1).max())


@pytest.mark.parametrize("kind", ["s0", "v1", "router"])
@pytest.mark.parametrize("level", [0.0, 0.2])
def test_rows_of_one_pass_are_each_under_their_own_kappa(kind, level, tokenizer):
    knob = Knob(level, level)
    adapted = subject(kind, knob)
    kappas = [None, 0.9, level / 2, 0.5, None]
    asked = prompts(9, 9, 9, 21, 14)
    asked[1] = asked[2] = asked[0]  # one prompt under several kappas
    wanted, odds = [], []
    for ids, kappa in zip(asked, kappas, strict=True):
        with knob.raised(kappa or 0.0):
            wanted.append(plain(adapted, ids, NEW))
            odds.append(first_logprob(adapted, ids))
    assert abs(odds[0] - odds[1]) > 1e-4 and odds[0] == odds[2]
    engine = Engine(adapted, tokenizer, slots=4, prefill_tokens=16)
    requests = [
        Request(ids, max_new_tokens=NEW, ignore_eos=True, kappa=kappa, logprobs=0)
        for ids, kappa in zip(asked, kappas, strict=True)
    ]
    for _ in range(2):  # cold, then out of the store
        results = engine.generate(requests)
        assert [list(r.token_ids) for r in results] == wanted
        assert [r.logprobs[0].logprob for r in results] == pytest.approx(odds, abs=1e-5)
    assert all(r.cached_tokens > 0 for r in results if r.prompt_tokens > 20)


def test_a_prompt_under_another_kappa_finds_none_of_the_blocks(tokenizer):
    adapted = subject("s0", Knob())
    engine = Engine(adapted, tokenizer, slots=1)
    ids = prompts(200)[0]

    def cached(kappa):
        request = Request(ids, max_new_tokens=1, kappa=kappa)
        return engine.generate([request])[0].cached_tokens

    assert cached(None) == 0 and cached(None) > 100
    assert cached(0.5) == 0 and cached(0.5) > 100
    assert cached(0.6) == 0
    assert cached(0.0) > 100  # changes nothing: those of no kappa
    for tenant in ("kappa", "0.5"):
        assert (
            engine.generate([Request(ids, max_new_tokens=1, tenant=tenant)])[0].cached_tokens == 0
        )


def test_a_bare_base_has_a_knob_too(tokenizer):
    model = make_llama()
    knob = Knob()
    plain_engine = Engine(make_llama(), tokenizer, slots=2)
    clamp_bare(model, make_basis(model, high=40.0), knob)
    engine = Engine(model, tokenizer, slots=2)
    ids = prompts(30)[0]
    bare, raised = (Request(ids, max_new_tokens=NEW, logprobs=0, kappa=k) for k in (None, 1.0))
    (without,) = plain_engine.generate([bare])
    low, high = engine.generate([bare, raised])
    assert low.token_ids == without.token_ids
    first = [r.logprobs[0].logprob for r in (without, low, high)]
    assert first[0] == pytest.approx(first[1], abs=1e-6) and abs(first[1] - first[2]) > 1e-4
    assert low.version != without.version  # what must be last is part of its name


def test_a_kappa_where_nothing_is_guarded_is_refused(tokenizer):
    engine = Engine(random_adapter("s0"), tokenizer)
    with pytest.raises(EngineError, match="none guards this model"):
        engine.submit(Request([3, 4, 5], kappa=0.5))
    with pytest.raises(EngineError, match=r"kappa must lie in \[0, 1\]"):
        Request([3, 4, 5], kappa=1.5)
