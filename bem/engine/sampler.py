"""From logits to tokens: each request in its own way, with random numbers of its own.

In this order: bias, penalties, grammar, temperature, min-p, top-k, top-p; log-probabilities are of what stands
before the grammar. What cuts off are transformers' own warpers.
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

SCORED = 64
"""Positions of a prompt whose log-probabilities are computed at once."""


def choose(logits: Float[Tensor, "rows vocabulary"], sequences: Row[Sequence]) -> list[int | None]:
    """The next token of each sequence; its log-probabilities, where they are wanted, go to the sequence.

    None: its grammar lets none follow.
    """
    likeliest = logits.argmax(-1).tolist()
    chosen: list[int | None] = []
    for row, sequence, best in zip(logits, sequences, likeliest, strict=True):
        sampling, matcher = sequence.request.sampling, sequence.matcher
        scores = row if sampling.plain else penalised(row, sequence)
        if matcher is None:
            token = best if sampling.plain else draw(scores, sampling, sequence.generator)
        elif (kept := matcher.allowed(len(row))).any():
            within = scores.masked_fill(~kept.to(row.device), -torch.inf)
            token = draw(within, sampling, sequence.generator)
        else:
            chosen.append(None)
            continue
        if sequence.request.logprobs is not None:
            wanted = sequence.request.logprobs
            sequence.logprobs += log_probabilities(scores[None], [token], wanted)
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
    # the likeliest at 0, in float64: however low the temperature, no infinity stands against another one
    scaled = (scores.double() - scores.max()) / sampling.temperature
    kept = _warpers(sampling)(torch.empty(1, 0), scaled[None])  # pyright: ignore[reportArgumentType]
    # on the host: a seed gives the same tokens on every device that gives these logits
    probabilities = kept[0].softmax(-1).cpu()
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


def log_probabilities(
    scores: Float[Tensor, "rows vocabulary"], tokens: Row[int], wanted: int
) -> list[TokenLogprob]:
    """Of one token for each row, and of so many that are likeliest there."""
    made: list[TokenLogprob] = []
    for at in range(0, len(tokens), SCORED):
        own = tokens[at : at + SCORED]
        logprobs = scores[at : at + SCORED].float().log_softmax(-1)
        ids = torch.tensor(own, device=scores.device)[:, None]
        best = logprobs.topk(min(wanted, logprobs.shape[-1]))
        made += [
            TokenLogprob(token, logprob, tuple(zip(likely, values, strict=True)))
            for token, logprob, likely, values in zip(
                own,
                logprobs.gather(-1, ids)[:, 0].tolist(),
                best.indices.tolist(),
                best.values.tolist(),
                strict=True,
            )
        ]
    return made
