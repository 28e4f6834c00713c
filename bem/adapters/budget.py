"""What an adapter costs, counted exactly, and the rank at which two of them cost the same.

Parameters are counted. FLOPs are those of matrix products (a multiply and an add are two), the
convention of `torch.utils.flop_counter`, for a prefill of a stated length: per-token work, plus the
controller's work per chunk slot, plus pooling. Elementwise products are not counted, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from bem.adapters.build import Parts, build
from bem.adapters.sites import Sites, find_sites
from bem.config import AdapterConfig
from bem.errors import AttachError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Price:
    """What an adapter costs."""

    parameters: int
    flops_per_token: float
    rows: tuple[tuple[str, str, int, float], ...]  # (site, kind, parameters, FLOPs per token)

    def ratio(self, other: Price) -> tuple[float, float]:
        """(parameters, FLOPs) in units of another's."""
        return self.parameters / other.parameters, self.flops_per_token / other.flops_per_token


def price_of(parts: dict[str, Parts], tokens: int = 512) -> Price:
    """Price of the modules that `build` made, for a prefill of `tokens` tokens."""
    controller = next((p.controller for p in parts.values() if p.controller is not None), None)
    slots = math.ceil(tokens / controller.chunk_size) if controller is not None else 0
    rows: list[tuple[str, str, int, float]] = []
    for site, part in parts.items():
        for module in (part.update, part.film, part.shaping):
            if module is not None:
                flops = module.flops()
                per_token = flops.per_token + flops.per_chunk * slots / tokens
                rows.append((site, type(module).__name__, _count(module), per_token))
    if controller is not None:
        per_token = controller.flops_per_chunk() * slots / tokens
        rows.append(("router", "Controller", _count(controller), per_token))
    return Price(sum(r[2] for r in rows), sum(r[3] for r in rows), tuple(rows))


def price(model: nn.Module, config: AdapterConfig, tokens: int = 512) -> Price:
    """What `config` would cost on `model`, without attaching anything."""
    return _price(find_sites(model, config.sites), config, tokens)


def match_rank(
    model: nn.Module,
    config: AdapterConfig,
    target: Price,
    on: Literal["parameters", "flops"] = "parameters",
    tolerance: float = 0.05,
    tokens: int = 512,
) -> AdapterConfig:
    """`config` with the ranks whose price comes nearest to `target`.

    First one rank for all sites; if that misses the tolerance, the rank at the attention output is
    tuned alone. Explicit `rank_attn` / `rank_mlp` are scaled along.

    Raises:
        AttachError: no rank reaches the tolerance; says the nearest price on either side.
    """
    sites = find_sites(model, config.sites)
    wanted = target.parameters if on == "parameters" else target.flops_per_token

    def cost(candidate: AdapterConfig) -> float:
        found = _price(sites, candidate, tokens)
        return found.parameters if on == "parameters" else found.flops_per_token

    best = _nearest(config, cost, wanted)
    options = [best]
    if config.variant in ("s0", "v1"):
        options += [
            best.model_copy(
                update={"rank_mlp": best.rank + up, "rank_attn": max(1, best.rank + side)}
            )
            for up in (-1, 0, 1)
            for side in range(-8, 9)
            if best.rank + up >= 1
        ]
    # the smallest change that fits, else whatever comes closest
    fitting = [o for o in options if abs(cost(o) / wanted - 1) <= tolerance]
    if not fitting:
        raise AttachError(
            f"no rank of {config.variant} meets {wanted:.0f} {on} within {tolerance:.0%}: rank {best.rank} costs "
            f"{cost(best):.0f}, rank {best.rank + 1} {cost(best.model_copy(update={'rank': best.rank + 1})):.0f}. "
            "Raise the baseline's rank, or set `match: none` and let the budget gate judge."
        )
    return min(fitting, key=lambda o: abs((o.rank_attn or o.rank) - (o.rank_mlp or o.rank)))


def _nearest(
    config: AdapterConfig, cost: Callable[[AdapterConfig], float], wanted: float
) -> AdapterConfig:
    """The one rank whose cost is nearest: cost grows with rank, so doubling and halving finds it."""

    def at(rank: int) -> AdapterConfig:
        update = {"rank": rank, "rank_attn": None, "rank_mlp": None}
        if config.rank_attn == 0 or config.rank_mlp == 0:  # a site that was left out stays out
            update |= {"rank_attn": 0 if config.rank_attn == 0 else None}
            update |= {"rank_mlp": 0 if config.rank_mlp == 0 else None}
        if config.k_active is not None:
            update["k_active"] = max(1, round(config.k_active * rank / config.rank))
        return config.model_copy(update=update)

    low, high = 1, 2
    while cost(at(high)) < wanted and high < 1 << 16:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(at(middle)) <= wanted else (low, middle)
    return min((at(low), at(high)), key=lambda c: abs(cost(c) - wanted))


def _price(sites: Sites, config: AdapterConfig, tokens: int) -> Price:
    with torch.device("meta"):
        return price_of(build(sites, config), tokens)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
