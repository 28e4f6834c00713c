"""What the router's contract compares: plans and logits of a router that was perturbed at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bem.adapters import checks_probe as probe
from bem.adapters.checks import TOKENS
from bem.adapters.checks_models import VOCAB
from bem.routing.action import EXPERT, RANK, RECORD, STRENGTH
from bem.routing.mounted import Mounted
from bem.routing.router import Chooser

ROWS = 6
TURNS = (4, 11)  # columns at which turns start; the last one has five chunks


def lively(mounted: Mounted) -> Mounted:
    """Perturb experts and policy (from a fixed seed), so that plans differ from text to text."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for stack in mounted.stacks.values():
            for u in stack.u.values():
                u.add_(0.05 * drawn(u, generator))
            stack.canonicalise()
        actor, critic = mounted.router.policy.actor, mounted.router.policy.critic
        reader = mounted.router.policy.reader
        for layer in (reader.token, actor.net.out, critic.net.out):
            layer.weight.copy_(1.5 * drawn(layer.weight, generator))
    mounted.router.trained = True
    mounted.model.eval()
    return mounted


def drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of its shape: the same on every device."""
    return torch.randn(like.shape, generator=generator, device="cpu").to(like.device)


def token_ids() -> Tensor:
    generator = torch.Generator().manual_seed(11)
    drawn = torch.randint(3, VOCAB, (ROWS, TOKENS), generator=generator, device="cpu")
    return drawn.to(torch.get_default_device())


def turn_starts(ids: Tensor) -> Tensor:
    turns = torch.zeros_like(ids, dtype=torch.bool)
    for at in TURNS:
        if at < ids.shape[1]:
            turns[:, at] = True
    return turns


def drawing(seed: int) -> Chooser:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return lambda distribution: distribution.sample(generator)


@torch.no_grad()
def forward(mounted: Mounted, ids: Tensor, **given: Any) -> Any:
    return mounted.model(input_ids=ids, **given)


def logits_of(mounted: Mounted, ids: Tensor) -> Tensor:
    return forward(mounted, ids, turn_starts=turn_starts(ids), use_cache=False).logits


def plan_of(mounted: Mounted, ids: Tensor, chooser: Chooser | None = None) -> Tensor:
    """Records of all chunks of one pass over whole texts (rows, chunks, RECORD)."""
    with mounted.router.watched(chooser) as tape:
        forward(mounted, ids, turn_starts=turn_starts(ids), use_cache=False)
    real = [step.record for step in tape if bool(step.real.all())]
    return torch.stack(real, 1)


def in_pieces(mounted: Mounted, ids: Tensor, cuts: list[int]) -> tuple[Tensor, Any]:
    turns, parts, cache = turn_starts(ids), [], None
    for a, b in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = forward(
            mounted,
            ids[:, a:b],
            turn_starts=turns[:, a:b],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1), cache


def plan_in(cache: Any) -> Tensor:
    """Records of all chunks as the cache holds them (rows, chunks, RECORD)."""
    _, tails = cache.layers[-1].memory()
    return tails[:, 1:, :RECORD]  # slot 0 stands before the first token


def chunks_until(token: int, size: int) -> int:
    """Chunks that begin at or before a token, whose action cannot depend on it."""
    begins = {0}
    for start, stop in zip((0, *TURNS), (*TURNS, TOKENS), strict=True):
        begins |= set(range(start, stop, size))
    return sum(b <= token for b in begins)


def longest_run(plan: Tensor, mounted: Mounted) -> int:
    """Most different actions in a row between two turn starts, counted from the records' options."""
    options = plan[..., [EXPERT, RANK, STRENGTH]]
    size, longest = mounted.router.chunk_size, 0
    begins = sorted(
        {b for a, z in zip((0, *TURNS), (*TURNS, TOKENS), strict=True) for b in range(a, z, size)}
    )
    for row in options:
        count, last = 0, None
        for begin, action in zip(begins, row.tolist(), strict=True):
            count = 1 if begin in (0, *TURNS) else count + (action != last)
            longest, last = max(longest, count), action
    return longest


def cropped(cache: Any, length: int, keep: int) -> bool:
    """Cut a cache of `length` tokens down to `keep`; False if its kind cannot be cut."""
    if not getattr(cache, "is_croppable", True):
        return False
    probe.crop(cache, length, keep)
    return True
