"""Answers that a model really gives: greedy, in left-padded batches, through the K/V cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bem.training.data import Encoded, collate, end_of_turn


@torch.no_grad()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Encoded], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of each answer, without what follows its end.

    Args:
        model: a `PeftModel` of ours; it is given the prompts' turn starts, evidence and route.
        prompts: encoded without an answer.
    """
    from transformers import GenerationConfig

    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ends = ends_of(model, tokenizer)
    batch = {key: value.to(model.device) for key, value in collate(prompts, pad_id).items()}
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=ends,
    )
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        turn_starts=batch["turn_starts"],
        generation_config=settings,
        **{key: batch[key] for key in ("evidence", "route") if key in batch},
    )
    answers = []
    for row in output[:, batch["input_ids"].shape[1] :].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the chat form's own mark, and the model's."""
    own = model.generation_config.eos_token_id
    known = [] if own is None else [own] if isinstance(own, int) else [int(i) for i in own]
    return sorted({end_of_turn(tokenizer), *known})
