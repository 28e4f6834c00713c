"""Which models the engine can run: those whose blocks see every earlier token, wherever a row stands.

What a config says is checked first; then two short sequences at different places are run and compared with
plain forward passes, because configs do not say everything (positions taken from a mask, a bias by distance).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bem.bases.limits import context_length, text_config
from bem.engine.acts import Acts
from bem.engine.request import Request
from bem.engine.runner import Piece, Runner
from bem.engine.sequence import Sequence, Spans
from bem.errors import EngineError

KINDS = ("full_attention", "sliding_attention", "chunked_attention")
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest difference of a probe's logits, as a share of the largest logit; others: 0.1."""


def longest(model: Any) -> int:
    """Tokens of the longest sequence: positions, or the window of attention that does not reach further.

    Raises:
        EngineError: the model keeps its past in another form than keys and values of all tokens.
    """
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise EngineError(
            f"{type(model).__name__} is an encoder and decoder: the engine runs decoders."
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if odd := sorted(kinds - set(KINDS)):
        raise EngineError(
            f"{type(model).__name__} has {', '.join(odd)} layers: the engine keeps keys and values of all tokens and "
            "nothing else. Use generate."
        )
    limits = [context_length(model)]
    limited = bool(kinds - {"full_attention"}) or not kinds
    if limited and getattr(config, "use_sliding_window", True):
        limits += [
            getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")
        ]
    return min([n for n in limits if isinstance(n, int) and n > 0], default=1 << 20)


def length_of(model: Any, wanted: int | None) -> int:
    """Tokens that a sequence may have.

    Args:
        wanted: fewer than the model allows; None: as many.
    Raises:
        EngineError: more, or too few; or see `longest`.
    """
    most = longest(model)
    if wanted is None:
        return most
    if not 2 <= wanted <= most:
        raise EngineError(
            f"max_tokens must be in 2 to {most}, what the model allows, got {wanted}."
        )
    return wanted


def mask_dtype(model: Any) -> torch.dtype:
    """Form of an attention mask: bool, or what is added to the logits.

    Raises:
        EngineError: this implementation of attention takes neither.
    """
    name = text_config(model)._attn_implementation
    if name == "sdpa":
        return torch.bool
    if name == "eager":
        return model.dtype
    raise EngineError(
        f"attention {name!r} takes no mask per row: call model.set_attn_implementation('sdpa') or load the base "
        "with attn_implementation='sdpa'."
    )


def check_probe(
    model: Any, alone: Callable[[list[int]], Tensor], together: Callable[..., Tensor]
) -> None:
    """Two sequences at different places give the logits that each gives alone.

    Args:
        alone: token ids -> logits behind the last (vocabulary).
        together: prompts, next tokens -> logits behind them (rows, vocabulary), computed as the engine does.
    Raises:
        EngineError: they do not, or the model fails.
    """
    prompts, then = [[3, 4, 5, 6, 7], [8, 9]], [10, 11]
    expected = torch.stack([alone([*p, t]) for p, t in zip(prompts, then, strict=True)])
    name = type(model).__name__
    try:
        found = together(prompts, then)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise EngineError(
            f"{name} does not run on rows at different places: {type(error).__name__} {error}. Use generate."
        ) from error
    bound = TOLERANCE.get(model.dtype, 0.1) * float(expected.abs().max())
    off = float((found - expected).abs().max())
    if not off <= bound:
        raise EngineError(
            f"{name} gives other logits on rows at different places (off by {off:.3g}, at most {bound:.3g} is "
            "rounding): its positions or masks are not those of the tokens. Use generate."
        )


def apart(runner: Runner, acts: Acts, prompts: list[list[int]], then: list[int]) -> Tensor:
    """Logits of sequences at different places, computed as the engine
    does, for `check_probe`."""
    rows = []
    for slot, (prompt, token) in enumerate(zip(prompts, then, strict=True)):
        sequence = Sequence(slot, Request(prompt), [*prompt, token], len(prompt), 0.0, acts=acts)
        sequence.slot = sequence.control = slot
        sequence.spans = Spans(len(prompt), (), acts.chunk_size)
        rows.append(sequence)
    if runner.control is not None:
        for sequence in rows:
            sequence.control = runner.control.state.begin()
    runner.run([Piece(s, s.prompt) for s in rows])
    return runner.run([Piece(s, 1) for s in rows])
