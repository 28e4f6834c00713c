"""Log-probabilities of a prompt are those of one plain forward pass over it."""

import pytest
import torch

from bem.engine.request import Request
from tests.engine.plain import prompts
from tests.engine.test_engine import adapted, engine_of

LENGTHS = (33, 9, 21, 1)


def plain_logprobs(subject, ids):
    """(of each token behind the first, the two likeliest there) by one pass; an answer would begin behind it."""
    marks = torch.zeros(1, len(ids), dtype=torch.bool)
    marks[0, -1] = True
    with torch.no_grad():
        logits = subject.model(input_ids=torch.tensor([ids]), turn_starts=marks).logits[0]
    logprobs = logits[:-1].log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    return own, logprobs.topk(2).values


@pytest.mark.parametrize("variant", ["v1", "router"])
def test_a_prompt_is_scored_as_a_plain_forward_pass_scores_it(variant, tokenizer):
    subject = adapted(variant)
    asked = prompts(*LENGTHS)
    engine = engine_of(subject, tokenizer, prefill_tokens=14)  # in pieces, of several rows
    requests = [
        Request(ids, max_new_tokens=4 * (i % 2), ignore_eos=True, prompt_logprobs=2)
        for i, ids in enumerate(asked)
    ]
    free = [Request(ids, max_new_tokens=4, ignore_eos=True) for ids in asked]
    expected = engine.generate(free)
    for _ in range(2):  # behind a warm store nothing else comes out
        given = engine.generate([*requests, *free])
        for i, (ids, result) in enumerate(zip(asked, given, strict=False)):
            own, best = plain_logprobs(subject, ids)
            assert [t.token_id for t in result.prompt_logprobs] == ids[1:]
            found = torch.tensor([t.logprob for t in result.prompt_logprobs])
            assert torch.allclose(found, own, atol=1e-4)
            top = torch.tensor([[v for _, v in t.top] for t in result.prompt_logprobs])
            assert torch.allclose(top.view(-1, 2), best, atol=1e-4)
            assert result.cached_tokens == 0 and result.finish_reason == "length"
            assert result.token_ids == (expected[i].token_ids if i % 2 else ())
        assert [r.token_ids for r in given[len(asked) :]] == [r.token_ids for r in expected]
    assert engine.store.stats.missed["scored"] > 0


def test_what_stands_before_the_first_scored_token_is_taken_from_the_store(tokenizer):
    subject = adapted("router")
    (ids,) = prompts(40)
    engine = engine_of(subject, tokenizer, prefill_tokens=99)
    whole = engine.generate([Request(ids, max_new_tokens=0, prompt_logprobs=0)])[0]
    part = engine.generate(
        [Request(ids, max_new_tokens=0, prompt_logprobs=0, prompt_logprobs_from=27)]
    )[0]
    assert part.cached_tokens == 24  # chunks of 8; token 26 predicts token 27
    assert [t.token_id for t in part.prompt_logprobs] == ids[27:]
    for a, b in zip(part.prompt_logprobs, whole.prompt_logprobs[26:], strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4) and a.top == ()
