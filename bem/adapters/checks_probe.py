"""What the checks of the contract have in common: inputs, forward passes, comparisons."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bem.adapters.attached import Attached
from bem.adapters.checks_models import VOCAB

TOKENS = 45  # several chunks of 8, the last one not full
TOLERANCE = 1e-4  # largest |difference| of float32 logits


def token_ids() -> Int[Tensor, "2 tokens"]:
    """Two rows of TOKENS tokens, always the same."""
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(1, VOCAB, (2, TOKENS), generator=generator, device="cpu")
    return drawn.to(torch.get_default_device())


def in_eval(attached: Attached) -> Attached:
    """The same, in eval mode."""
    attached.model.eval()
    return attached


def perturbed(attached: Attached) -> Attached:
    """Random adapter weights, so that every part of it acts."""
    with seeded():
        for parameter in attached.parameters():
            parameter.data = torch.randn(parameter.shape).to(parameter) * 0.2
    return in_eval(attached)


@contextmanager
def seeded() -> Iterator[None]:
    """Random numbers that are always the same; the global state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


def forward(model: Any, ids: Tensor, **kwargs: Any) -> Any:
    """A forward pass, with evidence for adapters that read it."""
    with torch.no_grad():
        return model(input_ids=ids, **{**evidence_for(model, len(ids)), **kwargs})


def evidence_for(model: Any, rows: int) -> dict[str, Tensor]:
    """Keyword argument with different evidence for each row; empty if nothing active reads any."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    runtime = vars(inner).get("bem_runtime")
    readers = runtime.wiring.controller.conditioning if runtime and runtime.wiring else {}
    width = readers.get("evidence", 0)
    if not width:
        return {}
    values = torch.linspace(0.1, 1.0, 2 * width).view(2, width)
    return {"evidence": torch.cat([values, values.flip(1)])[:rows]}


def logits(model: Any, ids: Tensor) -> Float[Tensor, "batch tokens vocabulary"]:
    """Of a forward pass without a cache."""
    return forward(model, ids, use_cache=False).logits


def loss_of(model: Any, ids: Tensor) -> Float[Tensor, ""]:
    """The model's own loss on everything behind the first 13 tokens."""
    labels = ids.clone()
    labels[:, :13] = -100
    given = evidence_for(model, len(ids))
    return model(input_ids=ids, labels=labels, use_cache=False, **given).loss


def piece(model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """(logits, cache) of one piece of a sequence behind what the cache holds."""
    name = cache_name(model)
    out = forward(model, ids, **{name: cache}, use_cache=True)
    return out.logits, out[name]


def arguments(model: Any) -> list[str]:
    """What a model's forward pass takes, wrapped by PEFT or not."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(inspect.signature(inner.forward).parameters)


def cache_name(model: Any) -> str:
    """Argument and output that hold the cache: state space models call it by another name."""
    return "cache_params" if "cache_params" in arguments(model) else "past_key_values"


def in_pieces(model: Any, ids: Tensor, cuts: list[int]) -> Tensor:
    """Logits of a sequence that is cut there and goes through one cache."""
    parts, cache = [], None
    for a, b in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        part, cache = piece(model, ids[:, a:b], cache)
        parts.append(part)
    return torch.cat(parts, 1)


def crop(cache: Any, length: int, keep: int) -> None:
    """Newer transformers count the tokens to remove, older ones the length to keep."""
    try:
        cache.crop(keep - length)
    except ValueError:
        cache.crop(keep)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; AssertionError for different shapes."""
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return float((a.float() - b.float()).abs().max())


def assert_equal(a: Tensor, b: Tensor, tolerance: float) -> str:
    """Their difference as text; AssertionError if it is above the tolerance."""
    worst = difference(a, b)
    assert worst <= tolerance, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}" if worst else "0"
