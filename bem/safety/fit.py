"""Make a safety basis for a base from harmful and harmless prompts, and accept it only if it earns it.

    basis = fit_basis(model, tokenizer, harmful, harmless)      # SafetyError: not accepted, and why

Three fifths of the prompts make the directions and the clamp's marks; the rest decides. A block is accepted if
there the AUROC between harmful and harmless prompts, along the basis, is above that of every one of 100
random bases of its size; the whole, if clamping the bare base at `kappa` moves its next-token distribution on
harmless prompts by at most `kl_limit` nats per token on average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from bem.adapters.names import innermost
from bem.adapters.sites import find_sites
from bem.adapters.version import base_digest
from bem.errors import SafetyError
from bem.routing.modes import mode
from bem.safety.auroc import Auroc, auroc
from bem.safety.basis import ProtectedLayer, SafetyBasis
from bem.safety.directions import (
    clusters,
    contrast_directions,
    coordinates,
    discriminant,
    unit_rms,
)
from bem.safety.knob import Knob
from bem.safety.protect import Clamp, check_plain_residual, clamped

RANDOM_BASES = 100
LOW_SHARE = 0.005
"""Of harmless tokens so many lie below `low`, in each direction."""
UNNAMED_CATEGORIES = 6
MOST_CLAMPED = 40
DEPTHS = (0.4, 0.5, 0.6, 0.7, 0.8)
"""Blocks that are tried, as shares of the depth."""
NOT_COVERED = (
    "what base layers make of inputs that an adapter changed, between the protected blocks and above the last",
    "queries, keys and values, and temperatures of attention",
    "harm that the base itself does not tell from harmless: the basis holds what this base knows",
)


@dataclass(frozen=True)
class FitOptions:
    """How a basis is made."""

    blocks: tuple[int, ...] | None = None
    """Which may be protected; None: five between two and four fifths of the depth."""
    keep: int = 2
    """How many of the accepted blocks to protect: those with the highest held-out AUROC."""
    directions: int = 4
    """Of each block, 1 to 8."""
    kappa: float = 0.3
    """At which the harmless KL is limited."""
    kl_limit: float = 0.05
    """Nats per token."""
    seed: int = 0


def fit_basis(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[str],
    harmless: Sequence[str],
    options: FitOptions | None = None,
    categories: Sequence[str | None] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> SafetyBasis:
    """Fit and judge a basis; nothing on the model changes.

    Args:
        model: the bare base, without an adapter.
        harmful, harmless: prompts of one user turn; at least 20 of each.
        categories: of the harmful ones; None, or a None among them: clusters of their states are used.
        tell: gets a line for each stage.
    Raises:
        SafetyError: too few prompts, an adapter on the model, blocks that cannot be protected, or a basis
            that was not accepted.
    """
    options, base = options or FitOptions(), innermost(model)
    names, blocks = _checked(base, harmful, harmless, options)
    rng = np.random.default_rng(options.seed)
    bad_order, good_order = rng.permutation(len(harmful)), rng.permutation(len(harmless))
    reader, first = Reader(base, tokenizer, [names[b] for b in blocks]), 3 * len(harmless) // 5
    tell(f"reading {len(harmful)} harmful prompts")
    bad = reader.last_tokens([harmful[int(i)] for i in bad_order])
    tell(f"reading {len(harmless)} harmless prompts")
    good, tokens = reader.all_tokens([harmless[int(i)] for i in good_order], first)
    named = None if categories is None else [categories[int(i)] for i in bad_order]
    tried = [
        _layer(block, bad[:, n], good[:, n], tokens[:, n], named, options)
        for n, block in enumerate(blocks)
    ]
    layers = _best(tried, options.keep)
    held = [harmless[int(i)] for i in good_order[first:]][:MOST_CLAMPED]
    tell(f"clamping the base on {len(held)} harmless prompts")
    about = {
        "tried": [t.about() for t in tried],
        "harmless_kl": _limited_kl(base, tokenizer, names, layers, held, options),
        "prompts": [len(harmful), len(harmless)],
        "options": _plain(options),
        "not covered": list(NOT_COVERED),
    }
    return SafetyBasis(base_digest(base), layers, about)


def _checked(
    base: Any, harmful: Sequence[str], harmless: Sequence[str], options: FitOptions
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(names of all blocks, numbers of those to try) of a base on which a basis can be fitted."""
    if hasattr(base, "bem_runtime"):
        raise SafetyError(
            "fit a basis on the bare base: detach the adapter, or load the base anew."
        )
    if min(len(harmful), len(harmless)) < 20:
        raise SafetyError(
            f"a basis needs at least 20 prompts of each kind, got {len(harmful)} harmful and {len(harmless)} harmless."
        )
    sites = find_sites(base)
    check_plain_residual(base, sites)
    depth = len(sites.blocks)
    blocks = options.blocks or tuple(sorted({min(depth - 1, int(depth * x)) for x in DEPTHS}))
    if not all(0 <= b < depth for b in blocks):
        raise SafetyError(f"blocks {blocks} must lie in 0..{depth - 1}.")
    return sites.blocks, blocks


def _best(tried: Sequence[_Tried], keep: int) -> tuple[ProtectedLayer, ...]:
    """The accepted blocks with the highest held-out AUROC, bottom to top.

    Raises:
        SafetyError: none was accepted.
    """
    accepted = [t for t in tried if t.held_out.value > t.best_random]
    if not accepted:
        raise SafetyError(
            f"no block was accepted: held-out AUROC {[round(t.held_out.value, 3) for t in tried]} in blocks "
            f"{[t.layer.block for t in tried]} is not above the best random basis, "
            f"{[round(t.best_random, 3) for t in tried]}."
        )
    best = sorted(accepted, key=lambda t: -t.held_out.value)[:keep]
    return tuple(sorted((t.layer for t in best), key=lambda layer: layer.block))


@dataclass(frozen=True)
class _Tried:
    layer: ProtectedLayer
    held_out: Auroc
    first: Auroc
    """Along the difference of means alone."""
    best_random: float

    def about(self) -> dict[str, Any]:
        a = self.held_out
        return {
            "block": self.layer.block,
            "directions": self.layer.directions.shape[1],
            "held_out_auroc": [a.value, a.ci_low, a.ci_high],
            "first_direction_auroc": self.first.value,
            "best_of_random": self.best_random,
            "held_out": [a.positives, a.negatives],
        }


def _layer(
    block: int,
    bad: Float[Tensor, "n d"],
    good: Float[Tensor, "m d"],
    tokens: Float[Tensor, "t d"],
    categories: Sequence[str | None] | None,
    options: FitOptions,
) -> _Tried:
    """One block's directions and marks, and how they do on the held-out two fifths."""
    n, m = 3 * len(bad) // 5, 3 * len(good) // 5
    numbers = _numbers(categories, bad)[:n]
    directions = contrast_directions(bad[:n], good[:m], numbers, options.directions)

    def held_out(basis: Tensor) -> Auroc:
        b, g = (coordinates(x.double(), basis)[0] for x in (bad, good))
        w = discriminant(b[:n], g[:m])
        return auroc((b[n:] @ w).tolist(), (g[m:] @ w).tolist())

    generator = torch.Generator().manual_seed(options.seed)
    shape = len(directions), directions.shape[1]
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(RANDOM_BASES))  # fmt: skip
    best_random = max(held_out(torch.linalg.qr(x).Q).value for x in drawn)
    low = torch.quantile(coordinates(tokens.double(), directions)[0], LOW_SHARE, 0)
    high = coordinates(bad[:n].double(), directions)[0].median(0).values.maximum(low)
    layer = ProtectedLayer(block, directions.float(), low.float(), high.float())
    return _Tried(layer, held_out(directions), held_out(directions[:, :1]), best_random)


def _numbers(categories: Sequence[str | None] | None, states: Tensor) -> list[int]:
    if categories is None or any(c is None for c in categories):
        return clusters(unit_rms(states), UNNAMED_CATEGORIES)
    order = sorted({str(c) for c in categories})
    return [order.index(str(c)) for c in categories]


def _limited_kl(
    base: Any,
    tokenizer: Any,
    blocks: Sequence[str],
    layers: Sequence[ProtectedLayer],
    prompts: Sequence[str],
    options: FitOptions,
) -> dict[str, float]:
    """kappa -> KL(base || clamped) in nats per token of harmless prompts.

    Raises:
        SafetyError: it is above the limit at the kappa of the options.
    """
    kappas = sorted({options.kappa, 0.6, 1.0})
    kl = harmless_kl(base, tokenizer, blocks, layers, prompts, kappas)
    measured = dict(zip(map(str, kappas), kl, strict=True))
    if not measured[str(options.kappa)] <= options.kl_limit:
        raise SafetyError(
            f"not accepted: at kappa {options.kappa} the clamp moves harmless prompts by "
            f"{measured[str(options.kappa)]:.3f} nats per token, at most {options.kl_limit} are allowed. Lower kappa, "
            "protect fewer blocks or directions, or give more harmless prompts."
        )
    return measured


@torch.no_grad()
def harmless_kl(
    base: Any,
    tokenizer: Any,
    blocks: Sequence[str],
    layers: Sequence[ProtectedLayer],
    prompts: Sequence[str],
    kappas: Sequence[float],
) -> list[float]:
    """Mean KL(base || clamped base) per token, in nats, at each kappa."""
    knob, modules, totals, count = Knob(), dict(base.named_modules()), [0.0] * len(kappas), 0
    with mode(base, training=False):
        for prompt in prompts:
            ids = prompt_ids(tokenizer, prompt, base.device)
            plain = base(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            handles = [
                modules[blocks[la.block]].register_forward_hook(
                    partial(clamped, Clamp(la, knob, ""))
                )
                for la in layers
            ]
            try:
                for n, kappa in enumerate(kappas):
                    with knob.raised(kappa):
                        moved = base(input_ids=ids, use_cache=False).logits[0].double()
                    kl = (plain.exp() * (plain - moved.log_softmax(-1))).sum(-1)
                    totals[n] += float(kl.sum())
            finally:
                for handle in handles:
                    handle.remove()
            count += ids.shape[1]
    return [total / count for total in totals]


def prompt_ids(tokenizer: Any, prompt: str, device: Any) -> Tensor:
    """(1, tokens): one user turn in the chat template, up to where the answer begins; without one, the text."""
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    return torch.tensor([ids], device=device)


class Reader:
    """States of prompts behind some blocks of a base."""

    def __init__(self, base: Any, tokenizer: Any, blocks: Sequence[str]):
        self.base, self.tokenizer = base, tokenizer
        modules = dict(base.named_modules())
        self.blocks = [modules[name] for name in blocks]

    def last_tokens(self, prompts: Sequence[str]) -> Float[Tensor, "n blocks d"]:
        """Of each prompt's last token."""
        return torch.stack([self._states(p)[:, -1] for p in prompts])

    def pooled(self, prompt: str) -> dict[str, Float[Tensor, "blocks d"]]:
        """Of one prompt: its last token's states, and the mean over all tokens but the first, which takes in
        attention that nothing needs."""
        states = self._states(prompt)
        return {"last": states[:, -1], "mean": states[:, 1:].mean(1)}

    def all_tokens(self, prompts: Sequence[str], most: int) -> tuple[Tensor, Tensor]:
        """(last tokens (n, blocks, d), every token of the first `most` prompts (t, blocks, d))."""
        last, every = [], []
        for number, prompt in enumerate(prompts):
            states = self._states(prompt)
            last.append(states[:, -1])
            if number < most:
                every.append(states.transpose(0, 1))
        return torch.stack(last), torch.cat(every)

    @torch.no_grad()
    def _states(self, prompt: str) -> Float[Tensor, "blocks tokens d"]:
        found: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            found.append((output[0] if isinstance(output, tuple | list) else output)[0].float())

        handles = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            with mode(self.base, training=False):
                ids = prompt_ids(self.tokenizer, prompt, self.base.device)
                self.base.base_model(input_ids=ids, use_cache=False)  # without the head
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(found).cpu()


def _plain(options: FitOptions) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(options).items()}
