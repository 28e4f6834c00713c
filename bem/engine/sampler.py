"""From logits to tokens: each request in its own way, with random numbers of its own.

In this order: bias, penalties, temperature, min-p, top-k, top-p; log-probabilities are of what stands
before the temperature. What cuts off are transformers' own warpers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Row

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bem.engine.request import Sampling, TokenLogprob
from bem.engine.sequence import Sequence


def choose(logits: Float[Tensor, "rows vocabulary"], sequences: Row[Sequence]) -> list[int]:
    """The next token of each sequence; its log-probabilities, where they are wanted, go to the sequence."""
    likeliest = logits.argmax(-1).tolist()
    chosen = []
    for row, sequence, best in zip(logits, sequences, likeliest, strict=True):
        sampling = sequence.request.sampling
        scores = row if sampling.plain else penalised(row, sequence)
        token = best if sampling.plain else draw(scores, sampling, sequence.generator)
        if sequence.request.logprobs is not None:
            sequence.logprobs.append(_logprob(scores, token, sequence.request.logprobs))
        chosen.append(token)
    return chosen


def penalised(
    row: Float[Tensor, " vocabulary"], sequence: Sequence
) -> Float[Tensor, " vocabulary"]:
    """Logits after bias and penalties."""
    sampling, row = sequence.request.sampling, row.clone()
    for token, bias in sampling.logit_bias.items():
        row[token] += bias
    if sampling.repetition_penalty != 1:
        process = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        ids = torch.tensor([sequence.ids], device=row.device)
        row = process(ids, row[None])[0]  # pyright: ignore[reportArgumentType]
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = Counter(sequence.ids[sequence.prompt :])
        at = torch.tensor(list(counts), dtype=torch.long, device=row.device)
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[at] -= sampling.presence_penalty + sampling.frequency_penalty * times
    return row


def draw(
    scores: Float[Tensor, " vocabulary"], sampling: Sampling, generator: torch.Generator | None
) -> int:
    """A token; the most likely one at temperature 0."""
    if not sampling.temperature:
        return int(scores.argmax())
    kept = _warpers(sampling)(torch.empty(1, 0), (scores / sampling.temperature)[None])  # pyright: ignore[reportArgumentType]
    # on the host: a seed gives the same tokens on every device that gives these logits
    probabilities = kept[0].double().softmax(-1).cpu()
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    kept = LogitsProcessorList()
    if sampling.min_p:
        kept.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        kept.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        kept.append(TopPLogitsWarper(sampling.top_p))
    return kept


def _logprob(scores: Float[Tensor, " vocabulary"], token: int, wanted: int) -> TokenLogprob:
    logprobs = scores.log_softmax(-1)
    best = logprobs.topk(min(wanted, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
