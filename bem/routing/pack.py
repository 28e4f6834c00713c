"""What decides and acts on a model at one moment, behind one pointer.

A sequence goes on under the pack with which it began; a new one takes the pack that the pointer shows
then. So an expert can be unloaded, and a router replaced, while sequences run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from bem.control.wiring import Acting
from bem.errors import AttachError
from bem.experts.slab import SitePack
from bem.variants.digest import weights_digest

if TYPE_CHECKING:
    from bem.routing.router import AgenticRouter


@dataclass(frozen=True, eq=False)
class Pack(Acting):
    """The experts of all sites and the router over them. Immutable: whoever holds it keeps what he had."""

    controller: AgenticRouter
    members: tuple[SitePack, ...]
    origin: object = None
    sites: tuple[str, ...] = ()
    """Names of the adapted layers, in the order of `members`."""

    def at_strength(self, factor: float) -> Pack:
        """The same experts, what they do times a factor."""
        scaled = replace(self, controller=self.controller.at_strength(factor))
        vars(scaled)["expert_digests"] = self.expert_digests  # the same weights: not hashed again
        return scaled

    @cached_property
    def expert_digests(self) -> tuple[str, ...]:
        """Digest of each expert's weights as they act, by number; see `Expert.digest`."""
        experts = range(len(self.members[0].engine.ranks))
        return tuple(weights_digest(self._weights_of(e)) for e in experts)

    def _weights_of(self, expert: int) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for site, member in zip(self.sites, self.members, strict=True):
            u, v = member.block(expert)
            if len(v):
                named |= {f"{site}.u": u, f"{site}.v": v}
        return named

    @cached_property
    def digest(self) -> str:
        """Of all experts; the router's weights decide, but they do not act."""
        return _together(self.expert_digests)

    def acting(self, applied: Float[Tensor, " width"]) -> str:
        """Digest of the experts that act under an applied control: what a chunk's key holds of the
        weights, so that it stays while the others change."""
        return _together(self.digests_acting(applied))

    def digests_acting(self, applied: Float[Tensor, " width"]) -> tuple[str, ...]:
        """Digest of each expert that acts under an applied control."""
        used: set[int] = set()
        for member, control in zip(self.members, applied.split(self._widths), strict=True):
            used |= set(member.engine.owner[control.to(member.v.device) != 0].tolist())
        return tuple(self.expert_digests[e] for e in sorted(used))

    @cached_property
    def _widths(self) -> list[int]:
        return [member.control_width for member in self.members]

    def check_finite(self) -> None:
        """Refuse weights that cannot be used, once: decoding looks at no number.

        Raises:
            AttachError: NaN or infinite weights of an expert or of the router.
        """
        tensors: dict[str, tuple[Tensor, ...]] = {
            f"expert weights at {s}": (m.u, m.v)
            for s, m in zip(self.sites, self.members, strict=True)
        }
        tensors["the router's policy"] = tuple(self.controller.policy.parameters())
        for name, weights in tensors.items():
            if not all(bool(torch.isfinite(w).all()) for w in weights):
                raise AttachError(f"{name}: NaN or infinite weights, its training diverged.")


def _together(digests: Iterable[str]) -> str:
    return sha256(" ".join(digests).encode()).hexdigest()
