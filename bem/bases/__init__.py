"""Base models: the small one shipped with the package, any local folder, any Hugging Face id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bem.errors import AttachError

SHIPPED = {"bem-tiny": Path(__file__).parent / "bem-tiny"}


def load_base(
    name: str = "bem-tiny", device: str = "cpu", dtype: Any = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer, ready to be adapted (eval mode, float32 on CPU).

    Args:
        name: `bem-tiny`, a folder, or a Hugging Face id.
        device: torch device.
        dtype: torch dtype of the weights; None: float32 on CPU, bfloat16 elsewhere.
    Raises:
        AttachError: nothing of that name can be loaded.
    """
    where = str(SHIPPED.get(name, name))
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
    except (OSError, ValueError) as error:
        raise AttachError(
            f"No base model {name!r}: {str(error).splitlines()[0]} "
            f"Give a folder, a Hugging Face id, or one of {', '.join(SHIPPED)}."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.to(device).eval(), tokenizer  # pyright: ignore
