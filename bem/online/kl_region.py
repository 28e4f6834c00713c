"""A trust region of behaviour: on a frozen set of situations a policy may differ only so much.

    mean KL(last accepted || new) <= near   and   mean KL(base || new) <= far      (exact, in nats)

The second bound is there because many small accepted steps creep. A proposal is first scaled by the
quadratic model of KL, d <- d min(1, sqrt(2 near / d^T F d)), then halved until both bounds hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bem.errors import DataError
from bem.online.penalties import NamedPolicy, trainable
from bem.routing.distribution import HeadsDistribution
from bem.training.trpo import fisher_vector_product


@dataclass(frozen=True)
class Limited:
    """What was left of a proposed step."""

    accepted: bool
    """False: the policy has the weights it had before, bit for bit."""
    scale: float
    """Of the proposed step; 0 if refused."""
    kl_near: float
    """Mean KL(last accepted || new), nats, after the step."""
    kl_far: float
    """Mean KL(base || new)."""
    reason: str
    """Why it was refused; '' if not."""


class KlRegion:
    """Bounds around the last accepted policy and around the base, on a probe set that never changes."""

    def __init__(
        self,
        obs: Float[Tensor, "n width"],
        base: HeadsDistribution,
        accepted: HeadsDistribution,
        near: float = 0.01,
        far: float = 0.1,
        halvings: int = 10,
    ):
        """
        Args:
            obs: the probe set.
            base, accepted: what the base and the last accepted policy do there.
            near, far: largest mean KL to the last accepted policy and to the base, nats.
            halvings: how often a step may be halved.
        """
        if not (0 < near <= far and halvings >= 0):
            raise ValueError(
                f"need 0 < near <= far and halvings >= 0; got {near}, {far}, {halvings}."
            )
        if not len(obs):
            raise DataError("a probe set needs at least one row.")
        self.obs, self.base, self.accepted = obs, base, accepted
        self.near, self.far, self.halvings = near, far, halvings

    @staticmethod
    def around(
        actor: NamedPolicy,
        obs: Float[Tensor, "n width"],
        masks: Sequence[Tensor],
        near: float = 0.01,
        far: float = 0.1,
        halvings: int = 10,
    ) -> KlRegion:
        """Around a base that is also the first accepted policy; masks bool (n, n_h) per head."""
        with torch.no_grad():
            base = actor.distribution(obs, [mask.clone() for mask in masks]).detach()
        return KlRegion(obs.detach().clone(), base, base, near, far, halvings)

    def accept(self, actor: NamedPolicy) -> None:
        """From now on `near` is around this policy: a canary has accepted it."""
        self.accepted = self._behaviour(actor)

    @torch.no_grad()
    def kl(self, actor: NamedPolicy) -> tuple[float, float]:
        """Mean KL (last accepted || actor, base || actor)."""
        now = self._behaviour(actor)
        near, far = (float(old.kl(now).double().mean()) for old in (self.accepted, self.base))
        return near, far

    @torch.no_grad()
    def _behaviour(self, actor: NamedPolicy) -> HeadsDistribution:
        return actor.distribution(self.obs, self.base.masks).detach()

    def limit(self, actor: NamedPolicy, before: Mapping[str, Tensor]) -> Limited:
        """Shorten the step from `before` to the actor's present weights until both bounds hold, in place.

        Args:
            before: name -> trainable weights before the step.
        """
        named = trainable(actor)
        if named.keys() != before.keys():
            raise ValueError(f"parameters differ: {sorted(named.keys() ^ before.keys())[0]!r}.")
        step = {name: p.detach() - before[name] for name, p in named.items()}
        _write(named, before, step, 0.0)
        if not all(bool(torch.isfinite(s).all()) for s in step.values()):
            return Limited(False, 0.0, *self.kl(actor), "the proposed step is not finite")
        scale = self._quadratic(actor, step)
        kl = (math.nan, math.nan)
        for _ in range(self.halvings + 1):
            _write(named, before, step, scale)
            kl = self.kl(actor)
            if kl[0] <= self.near and kl[1] <= self.far:  # false for NaN
                return Limited(True, scale, *kl, "")
            scale /= 2
        _write(named, before, step, 0.0)
        reason = (
            f"after {self.halvings} halvings KL is still {kl[0]:.3g} to the accepted policy (limit "
            f"{self.near:g}) and {kl[1]:.3g} to the base (limit {self.far:g})"
        )
        return Limited(False, 0.0, *self.kl(actor), reason)

    def _quadratic(self, actor: NamedPolicy, step: Mapping[str, Tensor]) -> float:
        """Scale at which half d^T F d is `near`, 1 at most; of the actor as it is before the step."""
        flat = torch.cat([s.reshape(-1) for s in step.values()])
        product = fisher_vector_product(actor, self.obs, self.base.masks)
        curvature = float(torch.dot(flat, product(flat)))
        return min(1.0, math.sqrt(2 * self.near / curvature)) if curvature > 0 else 1.0

    def tensors(self) -> dict[str, Tensor]:
        """What the region stands on, for safetensors; the bounds are settings."""
        kept = {"obs": self.obs}
        for h, mask in enumerate(self.base.masks):
            kept[f"mask.{h}"] = mask
            kept[f"base.{h}"] = self.base.log_probs[h]
            kept[f"accepted.{h}"] = self.accepted.log_probs[h]
        return kept

    @staticmethod
    def from_tensors(
        kept: Mapping[str, Tensor], near: float = 0.01, far: float = 0.1, halvings: int = 10
    ) -> KlRegion:
        """The inverse of `tensors`.

        Raises:
            DataError: a tensor is missing.
        """
        heads = range(sum(name.startswith("mask.") for name in kept))
        try:
            masks = [kept[f"mask.{h}"] for h in heads]
            base, accepted = (
                HeadsDistribution([kept[f"{which}.{h}"] for h in heads], masks)
                for which in ("base", "accepted")
            )
            return KlRegion(kept["obs"], base, accepted, near, far, halvings)
        except (KeyError, ValueError) as failed:
            raise DataError(f"these tensors are no trust region: {failed}.") from None


@torch.no_grad()
def _write(
    named: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    step: Mapping[str, Tensor],
    scale: float,
) -> None:
    """Weights before the step, plus a part of it; 0: exactly as before, whatever the step holds."""
    for name, p in named.items():
        p.copy_(before[name] if scale == 0 else before[name] + scale * step[name])
