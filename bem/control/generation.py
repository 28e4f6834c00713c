"""`model.generate` that says what is a prompt: its end is a turn start, and what was given holds on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bem.control.context import Ambient, GenerateCall, Given
from bem.control.step import last_tokens
from bem.errors import AttachError

CONDITIONING = ("evidence", "vision")
"""Names of what a model can be told beside its tokens. An adapter that reads one declares its width;
one that does not goes on as if it were not given."""
RECORDS = {"evidence": "EvidenceRecord", "vision": "VisionRecord"}
"""What says them."""


class MarkedGenerate:
    """Takes the place of a model's `generate`; all of its own arguments go through.

    `turn_starts` marks earlier turns (rows, prompt tokens); `conditioning` is what is known beside the
    tokens, name -> (rows, width), `evidence` and `vision` short forms for those names; `route` (rows, prompt
    tokens) says which expert a routed model shall use (see `AgenticRouter`).
    """

    def __init__(self, model: Any, ambient: Ambient):
        self.model, self.ambient = model, ambient

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = taken_from(kwargs)
        kwargs.setdefault("disable_compile", True)  # chunk boundaries are decided between two steps
        before, self.ambient.generating = self.ambient.generating, _call(args, kwargs, given)
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            self.ambient.generating = before


ADAPTER_NAMES = (
    "adapter_names chooses a PEFT adapter per row, and one BEM adapter is active at a time. Mount the adapters "
    "as experts (bem.mount) and give route=, or call once per adapter."
)


def _call(args: tuple, kwargs: dict[str, Any], given: Given) -> GenerateCall:
    named = (kwargs.get(k) for k in ("inputs_embeds", "input_ids", "inputs"))
    prompt = next((p for p in (*named, *args[:1]) if p is not None), None)
    if not isinstance(prompt, Tensor):  # from the beginning-of-sequence token alone
        return GenerateCall(1, None, None, given)
    rows, tokens = prompt.shape[:2]
    for name, value in given.conditioning.items():
        if len(value) != rows:
            raise AttachError(f"{name} has {len(value)} rows for {rows} prompts: one row each.")
    for name, value in (("turn_starts", given.turns), ("route", given.route)):
        if value is not None and tuple(value.shape[:2]) != (rows, tokens):
            raise AttachError(
                f"{name} {tuple(value.shape)} must begin with the shape of the prompts: {(rows, tokens)}."
            )
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != tokens:
        return GenerateCall(tokens, None, None, given)
    return GenerateCall(tokens, last_tokens(mask.bool(), tokens), mask, given)


def taken_from(kwargs: dict[str, Any]) -> Given:
    """What BEM is told, taken out of a call's arguments.

    Raises:
        AttachError: it cannot be used, whatever the model.
    """
    if kwargs.pop("adapter_names", None) is not None:
        raise AttachError(ADAPTER_NAMES)
    short = {name: kwargs.pop(name, None) for name in CONDITIONING}
    known = conditioning_of(kwargs.pop("conditioning", None), **short)
    turns, route = (_per_token(name, kwargs.pop(name, None)) for name in ("turn_starts", "route"))
    if route is not None and route.is_floating_point():
        raise AttachError(f"route must hold whole numbers, options of experts, not {route.dtype}.")
    return Given(turns, known, route)


def _per_token(name: str, given: Any) -> Tensor | None:
    try:
        return None if given is None else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AttachError(f"{name} must be a tensor, one value per token: {error}.") from None


def conditioning_of(given: Any, **short: Any) -> dict[str, Tensor]:
    """What the caller said beside the tokens, as float32 tensors.

    Raises:
        AttachError: an unknown name, no numbers, or numbers outside [0, 1].
    """
    if given is not None and not isinstance(given, dict):
        raise AttachError(f"conditioning must map names to features, found {type(given).__name__}.")
    values = dict(given or {})
    for name, value in short.items():
        if value is not None and name in values:
            raise AttachError(f"{name} was given twice: as {name}= and in conditioning=.")
    values |= {name: value for name, value in short.items() if value is not None}
    for name in values:
        if name not in CONDITIONING:
            raise AttachError(
                f"unknown conditioning {name!r}: an adapter can be told {', '.join(CONDITIONING)}."
            )
    return {n: _features(n, v) for n, v in values.items() if v is not None}


def _features(name: str, given: Any) -> Tensor:
    try:
        features = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise AttachError(f"{name} must be a tensor of features: {error}.") from None
    if not bool(((features >= 0) & (features <= 1)).all()):  # False for NaN too
        raise AttachError(
            f"{name} holds NaN or a number outside [0, 1]: give {RECORDS[name]}.features()."
        )
    return features
