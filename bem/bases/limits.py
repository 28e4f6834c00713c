"""Where the texts of a model end, as its own configs say: positions, and tokens that end an answer."""

from __future__ import annotations

from typing import Any

POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
"""What configs call it."""


def text_config(model: Any) -> Any:
    """Config of the text model, which may be one of several parts."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: Any) -> int | None:
    """Tokens that the model has positions for; None: its config sets no limit."""
    config = text_config(model)
    found = (getattr(config, name, None) for name in POSITIONS)
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def own_ends(model: Any) -> list[int]:
    """Tokens that end an answer by the model's generation_config."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else [int(i) for i in ends]
