"""The oracle: `generate` of the adapted model, one prompt at a time, without the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig


def plain(adapted, ids: Sequence[int], new: int, turns=(), evidence=None, route=None) -> list[int]:
    """Greedy tokens of exactly `new` steps."""
    adapted.base.generation_config.eos_token_id = None
    prompt = torch.tensor([list(ids)])
    marks = torch.zeros_like(prompt, dtype=torch.bool)
    marks[0, list(turns)] = True
    given = {"turn_starts": marks}
    if evidence is not None:
        given["evidence"] = torch.tensor([evidence])
    if route is not None:
        given["route"] = torch.full_like(prompt, route)
    settings = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    with torch.no_grad():
        out = adapted.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=settings,
            **given,
        )
    return out[0, len(ids) :].tolist()


def prompts(*lengths: int, seed: int = 0, vocabulary: int = 60) -> list[list[int]]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
