"""Several answers to one prompt, and what is refused before it waits."""

import pytest

from bem.engine.engine import Engine
from bem.engine.request import Request, Sampling
from bem.errors import EngineError, QueueFull
from tests.engine.plain import prompts
from tests.engine.test_engine import adapted, engine_of


@pytest.fixture(scope="module")
def subject():
    return adapted("v1")


def asked(ids, **fields) -> Request:
    return Request(ids, **{"max_new_tokens": 6, "ignore_eos": True, **fields})


def test_several_answers_are_those_of_as_many_seeds_and_the_prompt_is_read_once(subject, tokenizer):
    (ids,) = prompts(30)
    engine = engine_of(subject, tokenizer, slots=2, prefill_tokens=99)
    hot = {"temperature": 1.5}
    number = engine.submit(asked(ids, n=4, sampling=Sampling(**hot, seed=5), prompt_logprobs=0))
    steps = []
    while engine.busy:
        steps.append(engine.step())
    given = sorted((r for s in steps for r in s.finished), key=lambda r: r.index)
    assert [(r.id, r.index) for r in given] == [(number, i) for i in range(4)]
    assert sum(s.prefilled for s in steps) == 30 + 3  # the others read its last token
    assert [r.cached_tokens for r in given] == [0, 29, 29, 29]
    assert len({r.prompt_logprobs for r in given}) == 1 and len(given[0].prompt_logprobs) == 29
    alone = engine.generate([asked(ids, sampling=Sampling(**hot, seed=s)) for s in range(5, 9)])
    assert [r.token_ids for r in given] == [r.token_ids for r in alone]
    assert len({r.token_ids for r in given}) > 1


def test_answers_stand_in_the_order_of_the_prompts_and_are_cancelled_together(subject, tokenizer):
    one, two = prompts(9, 12)
    engine = Engine(subject, tokenizer, slots=3, queue=3, cache_gib=0)
    given = engine.generate([asked(one, n=2), asked(two, n=3), asked(one)])
    assert [r.prompt_tokens for r in given] == [9, 9, 12, 12, 12, 9]
    assert [r.index for r in given] == [0, 1, 0, 1, 2, 0]
    assert given[0].token_ids == given[1].token_ids == given[5].token_ids
    engine.submit(asked(one))
    with pytest.raises(QueueFull, match="1 requests wait, the queue holds 3"):
        engine.submit(asked(one, n=3))
    with pytest.raises(EngineError, match="n is 4, and no more than 3"):
        engine.submit(asked(one, n=4))
    number = engine.submit(asked(two, n=2, prompt_logprobs=0))
    engine.step()
    assert engine.cancel(number) and not engine.cancel(number)
    results = []
    while engine.busy:
        results += engine.step().finished
    assert [r.finish_reason for r in results if r.id == number] == ["cancelled"] * 2
    assert engine._rows == [None] * 3 and not len(engine.waiting)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"logit_bias": {64: 1.0}}, r"logit_bias names tokens \[64\]: the model has 64 entries"),
        ({"logit_bias": {-1: 1.0}}, r"logit_bias names tokens \[-1\]"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias must be finite"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be finite"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be > 0"),
        ({"seed": 1 << 70}, "seed must be between"),
    ],
)
def test_numbers_that_would_end_the_step_of_all_are_refused(sampling, message, subject, tokenizer):
    engine = Engine(subject, tokenizer)
    with pytest.raises(EngineError, match=message):
        engine.submit(asked([3, 4], sampling=Sampling(**sampling)))
    assert not engine.busy


def test_no_temperature_is_too_low(subject, tokenizer):
    (ids,) = prompts(9)
    engine = Engine(subject, tokenizer)
    low = [Sampling(temperature=t, seed=1) for t in (1e-5, 1e-300, 5e-324)]
    given = engine.generate([asked(ids), *(asked(ids, sampling=s) for s in low)])
    assert len({r.token_ids for r in given}) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"stop": "ab"}, r"write \['ab'\]"),
        ({"max_new_tokens": 0}, "give prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be at least 0, got -1"),
        ({"prompt_logprobs_from": 0}, "nothing precedes token 0"),
    ],
)
def test_requests_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(EngineError, match=message):
        asked([3, 4], **fields)
