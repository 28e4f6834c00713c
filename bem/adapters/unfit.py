"""Models that an adapter is refused on, and why: what their blocks read is not the text, or the next token
finds its past where a control cannot follow.

A refusal when the adapter is attached is worth more than wrong answers later.
"""

from __future__ import annotations

import inspect
from typing import Any

from bem.errors import AttachError

UNFIT = {
    "blt": "reads bytes in patches: its blocks see other tokens than the text has",
    "cpmant": "puts 32 prompt tokens of its own before the text: its blocks see other tokens than the text has",
    "gemma4_assistant": "drafts for another model, out of whose keys and values it lives",
    "gemma4_unified_assistant": "drafts for another model, out of whose keys and values it lives",
    "hrm_text": "runs its blocks several times in one pass: neither one control nor the stated price holds",
    "musicgen_decoder": "reads and predicts several codebooks at once, not one token behind another",
    "musicgen_melody_decoder": "reads and predicts several codebooks at once, not one token behind another",
    "prophetnet": "carries several copies of every token, one for each token that it predicts",
    "reformer": "hashes at random, pads to its chunks and computes its blocks again in backward",
}
"""Model type -> why no variant can act on it."""

UNCONTROLLED = {
    "minimax": "keeps part of its past beside the layers of its cache, to which then nothing can be added",
    "recurrent_gemma": "keeps its recurrent state inside its layers, one for all sequences",
    "xlnet": "hands its blocks tokens before rows, and keeps its past in `mems`",
    "xlstm": "keeps its past in a cache of its own kind, to which nothing can be added",
}
"""Model type -> why no control that changes from chunk to chunk can act on it."""

PAST = ("state", "mems", "past_buckets_states", "cache")
"""Arguments that hold a past, where it is no `Cache` of transformers."""


def refuse_unfit(model: Any) -> None:
    """Refuse a model whose blocks do not read the tokens of one text, once each.

    Raises:
        AttachError: says what they do.
    """
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind in UNFIT:
        raise AttachError(f"{type(model).__name__} {UNFIT[kind]}. Use another base.")


def refuse_uncontrolled(model: Any) -> None:
    """Refuse a model whose past a control that changes from chunk to chunk cannot follow.

    Raises:
        AttachError: says where the past is.
    """
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if why := UNCONTROLLED.get(kind) or _own_past(model):
        raise AttachError(
            f"{type(model).__name__} {why}: a control that changes from chunk to chunk cannot follow. Use a static "
            "variant there: attach(model, 's0') or attach(model, 'v3')."
        )


def _own_past(model: Any) -> str:
    """Where a model keeps its past, if that is no `Cache`; empty: it keeps one, or none at all."""
    arguments = inspect.signature(model.forward).parameters
    found = next((a for a in PAST if a in arguments), "")
    return f"keeps its past in `{found}`, which is no Cache of transformers" if found else ""
