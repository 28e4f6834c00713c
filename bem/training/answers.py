"""Answers that a model really gives: greedy, in left-padded batches, through the K/V cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from bem.bases.limits import own_ends
from bem.errors import MeasurementError
from bem.training.data import Encoded, check_fits, collate, end_of_turn


@dataclass(frozen=True)
class Decoded:
    """Answers to a batch of prompts, and what reading them left behind."""

    answers: list[list[int]]
    """Token ids, without what follows an answer's end."""
    prompts: dict[str, Tensor]
    """As they were read: see `collate`."""
    cache: Any
    """Keys, values and control of prompts and answers; None: the model keeps none."""


def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Encoded], max_new_tokens: int
) -> list[list[int]]:
    """`Decoded.answers` of `greedy_decoded`."""
    return greedy_decoded(model, tokenizer, prompts, max_new_tokens).answers


@torch.no_grad()
def greedy_decoded(
    model: Any, tokenizer: Any, prompts: Sequence[Encoded], max_new_tokens: int
) -> Decoded:
    """Answers, and the cache behind them.

    At every step the most likely token, whatever the base's generation_config says.

    Args:
        model: a `PeftModel` of ours; it is given the prompts' turn starts, evidence and route.
        prompts: encoded without an answer.
    Raises:
        MeasurementError: a prompt and its answer are longer than the model's positions, or a token
            has no embedding.
    """
    check_fits(model, tokenizer, prompts, max_new_tokens, MeasurementError)
    settings = greedy_generation(model, tokenizer, max_new_tokens)
    settings.return_dict_in_generate = True
    batch = collate(prompts, settings.pad_token_id)  # pyright: ignore[reportArgumentType]
    batch = {key: value.to(model.device) for key, value in batch.items()}
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        turn_starts=batch["turn_starts"],
        generation_config=settings,
        **{key: batch[key] for key in ("evidence", "vision", "route") if key in batch},
    )
    ends = ends_of(model, tokenizer)
    answers = []
    for row in output.sequences[:, batch["input_ids"].shape[1] :].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return Decoded(answers, batch, output.past_key_values)


class _Greedy(GenerationConfig):
    """Settings into which `generate` merges nothing of the base's own generation_config."""

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        if allow_custom_entries:  # how `generate` offers the base's settings, and them alone
            return {}
        return super().update(defaults_only, allow_custom_entries, **kwargs)


def greedy_generation(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Settings for `model.generate` that choose the most likely token and do nothing else.

    Given to `generate`, an ordinary GenerationConfig takes every value that it leaves open from the
    base's file: penalties, forbidden and forced tokens, least lengths, sampling, beams, static caches.
    Of that file only the tokens that end an answer count here.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return _Greedy(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends_of(model, tokenizer),
    )


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the chat form's own mark, and the model's."""
    return sorted({end_of_turn(tokenizer), *own_ends(model)})
