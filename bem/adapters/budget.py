"""What an adapter costs, counted exactly, and the rank at which two of them cost the same.

Parameters are counted. FLOPs are those of matrix products (a multiply and an add are two), the
convention of `torch.utils.flop_counter`, for a prefill of a stated length: per-token work, plus the
controller's work per chunk slot, plus pooling. Elementwise products are not counted, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from bem.adapters.build import Parts, build, left_alone_by
from bem.adapters.left_alone import LeftAlone
from bem.adapters.sites import find_sites
from bem.config import AdapterConfig
from bem.config.adapters import TwoSitesConfig
from bem.errors import AttachError


@dataclass(frozen=True)
class Price:
    """What an adapter costs, and what it leaves alone."""

    parameters: int
    flops_per_token: float
    rows: tuple[tuple[str, str, int, float], ...]
    """(site, kind, parameters, FLOPs per token); layers that are left alone cost nothing, the kind says why."""

    def ratio(self, other: Price) -> tuple[float, float]:
        """(parameters, FLOPs) in units of another's."""
        return self.parameters / other.parameters, self.flops_per_token / other.flops_per_token


def price_of(
    parts: Mapping[str, Parts], tokens: int = 512, left_alone: Iterable[LeftAlone] = ()
) -> Price:
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
        rows.append(("router", type(controller).__name__, _count(controller), per_token))
    rows += [(each.where, f"not adapted: {each.why}", 0, 0.0) for each in left_alone]
    return Price(sum(r[2] for r in rows), sum(r[3] for r in rows), tuple(rows))


def price(model: nn.Module, config: AdapterConfig, tokens: int = 512) -> Price:
    """What `config` would cost on `model`, without attaching anything."""
    sites = find_sites(model, config.sites)
    with torch.device("meta"):
        parts = build(sites, config)
    return price_of(parts, tokens, left_alone_by(model, sites, config, parts))


def match_rank(
    model: nn.Module,
    config: AdapterConfig,
    target: Price,
    on: Literal["parameters", "flops"] = "parameters",
    tolerance: float = 0.05,
    tokens: int = 512,
) -> AdapterConfig:
    """`config` with the ranks whose price comes nearest to `target`.

    All ranks are scaled by one factor: explicit `rank_attn` and `rank_mlp` keep their proportion to
    `rank`, and a site that was left out stays out. If that misses the tolerance, the ranks of the two
    sites are then varied a little on their own.

    Raises:
        AttachError: no rank reaches the tolerance; says the nearest price on either side.
    """
    sites = find_sites(model, config.sites)
    aim = target.parameters if on == "parameters" else target.flops_per_token

    def cost(candidate: AdapterConfig) -> float:
        with torch.device("meta"):
            made = price_of(build(sites, candidate), tokens)
        return made.parameters if on == "parameters" else made.flops_per_token

    best = _nearest(config, cost, aim)
    fitting = [o for o in _around(best) if abs(cost(o) / aim - 1) <= tolerance]
    if not fitting:
        above = _scaled(best, _largest(best) + 1)
        raise AttachError(
            f"no rank of {config.variant} meets {aim:.0f} {on} within {tolerance:.0%}: rank {_largest(best)} costs "
            f"{cost(best):.0f}, rank {_largest(above)} {cost(above):.0f}. "
            "Raise the baseline's rank, or set `match: none` and let the budget gate judge."
        )
    return min(fitting, key=lambda o: _distance(o, best))


def _around(best: AdapterConfig) -> list[AdapterConfig]:
    """`best`, and its neighbours with ranks of their own at the two sites."""
    if not isinstance(best, TwoSitesConfig):
        return [best]
    attn, mlp = _ranks(best)
    options: list[AdapterConfig] = [best]
    for mlp_more in (-1, 0, 1):
        for attn_more in range(-8, 9):
            update = {
                "rank_attn": max(1, attn + attn_more) if attn else 0,
                "rank_mlp": max(1, mlp + mlp_more) if mlp else 0,
            }
            options.append(best.model_copy(update=update))
    return options


def _ranks(config: TwoSitesConfig) -> tuple[int, int]:
    """(at the attention output, at the MLP)."""
    attn, mlp = config.rank_attn, config.rank_mlp
    return config.rank if attn is None else attn, config.rank if mlp is None else mlp


def _distance(option: AdapterConfig, best: AdapterConfig) -> int:
    """How far the ranks of the two sites were moved apart."""
    if not isinstance(option, TwoSitesConfig) or not isinstance(best, TwoSitesConfig):
        return 0
    (attn, mlp), (best_attn, best_mlp) = _ranks(option), _ranks(best)
    return abs((attn - mlp) - (best_attn - best_mlp))


def _scaled(config: AdapterConfig, largest: int) -> AdapterConfig:
    """`config` with its largest rank set to this; all others in proportion, 0 stays 0."""
    factor = largest / _largest(config)
    update: dict[str, int] = {}
    for knob in ("rank", "rank_attn", "rank_mlp", "k_active"):
        if own := getattr(config, knob, None):
            update[knob] = max(1, round(own * factor))
    return config.model_copy(update=update)


def _largest(config: AdapterConfig) -> int:
    return max(_ranks(config)) if isinstance(config, TwoSitesConfig) else config.rank


def _nearest(
    config: AdapterConfig, cost: Callable[[AdapterConfig], float], aim: float
) -> AdapterConfig:
    """The scale whose cost is nearest: cost grows with rank, so doubling and halving finds it."""
    low, high = 1, 2
    while cost(_scaled(config, high)) < aim and high < 1 << 16:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(_scaled(config, middle)) <= aim else (low, middle)
    options = [_scaled(config, low), _scaled(config, high)]
    return min(options, key=lambda c: abs(cost(c) - aim))


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
