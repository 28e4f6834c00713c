"""How tokens are chosen."""

import pytest
import torch

from bem.engine.request import Request, Sampling
from bem.engine.sampler import choose, draw, penalised
from bem.engine.sequence import Sequence
from bem.errors import EngineError

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


def sequence(sampling: Sampling, ids=(0, 1, 1), prompt=1, **fields) -> Sequence:
    made = Sequence(0, Request([0], sampling=sampling, **fields), list(ids), prompt, 0.0)
    made.generator = torch.Generator().manual_seed(0)
    return made


def frequencies(sampling: Sampling, n=4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.tensor([draw(LOGITS, sampling, generator) for _ in range(n)])
    return torch.bincount(drawn, minlength=4) / n


def test_the_most_likely_token_is_the_default():
    assert choose(LOGITS[None], [sequence(Sampling())]) == [1]
    assert Sampling().plain and not Sampling(logit_bias={0: 9.0}).plain
    assert choose(LOGITS[None], [sequence(Sampling(logit_bias={0: 9.0}))]) == [0]


def test_penalties_are_those_of_their_definitions():
    # token 0 is the prompt's, token 1 came twice in the answer
    out = penalised(LOGITS, sequence(Sampling(presence_penalty=0.5, frequency_penalty=0.25)))
    assert torch.allclose(out, torch.tensor([1.0, 3.0 - 0.5 - 0.5, 2.0, -1.0]))
    out = penalised(LOGITS, sequence(Sampling(repetition_penalty=2.0), ids=(0, 1, 3)))
    assert torch.allclose(out, torch.tensor([0.5, 1.5, 2.0, -2.0]))
    assert torch.equal(LOGITS, torch.tensor([1.0, 3.0, 2.0, -1.0]))


def test_temperature_draws_from_the_softmax_and_what_cuts_off_leaves_the_rest_in_proportion():
    softmax = (LOGITS / 2).softmax(0)
    assert torch.allclose(frequencies(Sampling(temperature=2.0)), softmax, atol=0.03)
    kept = torch.tensor([0.0, softmax[1], softmax[2], 0.0]) / (softmax[1] + softmax[2])
    for cut in ({"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.5}):
        assert torch.allclose(frequencies(Sampling(temperature=2.0, **cut)), kept, atol=0.03)


def test_log_probabilities_are_of_what_stands_before_the_temperature():
    asked = sequence(Sampling(temperature=5.0, seed=1), logprobs=2)
    (token,) = choose(LOGITS[None], [asked])
    (given,) = asked.logprobs
    expected = LOGITS.log_softmax(0)
    assert given.token_id == token and given.logprob == pytest.approx(float(expected[token]))
    assert [t for t, _ in given.top] == [1, 2]
    assert given.top[0][1] == pytest.approx(float(expected[1]))


@pytest.mark.parametrize(
    ("values", "bound"),
    [
        ({"temperature": -1}, ">= 0"),
        ({"top_p": 0}, r"in \(0, 1\]"),
        ({"min_p": 2}, r"in \[0, 1\]"),
        ({"top_k": -1}, ">= 0"),
        ({"repetition_penalty": 0}, "> 0"),
        ({"temperature": float("nan")}, ">= 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(values, bound):
    with pytest.raises(EngineError, match=f"{next(iter(values))} must be {bound}, got"):
        Sampling(**values)
