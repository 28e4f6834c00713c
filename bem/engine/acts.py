"""What acts on a sequence: settled when it is admitted, kept to its end, whatever is swapped meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bem.adapters.attached import Attached
from bem.adapters.version import Version, base_digest
from bem.control.wiring import Acting, Wiring
from bem.engine.request import ChunkAction
from bem.errors import EngineError
from bem.files import sha256_json
from bem.routing.action import EXPERT, RANK, RECORD, STRENGTH
from bem.routing.mounted import Mounted
from bem.routing.pack import Pack
from bem.safety.protect import clamps_of

STATIC_CHUNK = 64
"""Tokens of a chunk where nothing changes from chunk to chunk: the unit of the store alone."""


@dataclass(frozen=True, eq=False)
class Acts:
    """One version at work."""

    version: Version
    controller: str
    """Digest of all on which a decision depends beside what was read and said: equal for two releases that
    differ in an expert's weights alone."""
    acting: Acting | None
    """None: nothing changes from chunk to chunk."""
    wiring: Wiring | None
    dtype: torch.dtype

    @property
    def chunk_size(self) -> int:
        """Longest chunk in tokens."""
        return STATIC_CHUNK if self.acting is None else self.acting.controller.chunk_size

    @property
    def reads(self) -> dict[str, int]:
        """Name -> width of what it can be told beside the tokens."""
        return {} if self.acting is None else self.acting.controller.conditioning

    @property
    def frozen(self) -> bool:
        """Does it stay what it is while the model's weights are changed?"""
        return isinstance(self.acting, Pack)

    def weights(self, applied: Tensor) -> tuple[str, tuple[str, ...]]:
        """(digest of the weights that act under an applied control, digests by which they can be purged)."""
        if not isinstance(self.acting, Pack):
            return self.version.digest, ()
        acting, last = self.acting.acting(applied), self.version.config.get("last")
        # what must be last acts on every chunk: under another clamp it is another chunk
        return sha256_json([acting, last]) if last else acting, self.acting.digests_acting(applied)

    def at_strength(self, factor: float) -> Acts:
        """The same version, what its experts do times a factor; the same object for the same factor, while
        anybody holds it: rows under it share a pass.

        Raises:
            EngineError: there is no router whose experts could do more or less.
        """
        if factor == 1:
            return self
        if not isinstance(self.acting, Pack):
            raise EngineError(
                f"strength {factor} scales what a router's experts do, and none are mounted: see bem.mount."
            )
        found = self._strengths.get(factor)
        if found is None:
            scaled, decides = (
                self.acting.at_strength(factor),
                sha256_json([self.controller, factor]),
            )
            found = replace(self, acting=scaled, controller=decides)
            self._strengths[factor] = found
        return found

    @cached_property
    def _strengths(self) -> WeakValueDictionary[float, Acts]:
        return WeakValueDictionary()

    def compose_again(self, tail: Tensor) -> Tensor | None:
        """The control that a decision means under these weights, as it is applied; None: a decision and what
        is applied are one here.

        Args:
            tail: the controller's own part of a chunk's control (1, tail width).
        """
        pack = self.acting
        if not isinstance(pack, Pack):
            return None
        members = [member.at(self.dtype) for member in pack.members]
        control = pack.controller.composer(members, tail[:, None, :RECORD], pack.controller.rules)
        return control[:, 0].to(self.dtype).float()

    def option(self, route: str | int | None) -> int | None:
        """Option of the expert that a request names.

        Raises:
            EngineError: there is no such expert.
        """
        if route is None:
            return None
        if not isinstance(self.acting, Pack):
            raise EngineError(
                f"route {route!r} names an expert, and none are mounted: see bem.mount."
            )
        space = self.acting.controller.space
        if isinstance(route, int):
            found = route if 0 <= route < space.sizes[0] else None
        else:
            found = 0 if route == "base" else None
            found = space.option(route) if route in space.experts else found
        if found is None:
            known = ", ".join(["base", *space.experts])
            raise EngineError(f"no expert {route!r}. Experts, from option 0 on: {known}.")
        return found

    def actions(self, tails: Tensor, starts: list[int]) -> tuple[ChunkAction, ...]:
        """What a router did: from the tails of the chunks (chunks, tail width) that begin there."""
        if not isinstance(self.acting, Pack):
            return ()
        space = self.acting.controller.space
        return tuple(
            ChunkAction(
                start,
                space.name(int(record[EXPERT])),
                space.ranks[int(record[RANK])] if record[EXPERT] else 0,
                space.factor * space.strengths[int(record[STRENGTH])] if record[EXPERT] else 0.0,
            )
            for start, record in zip(starts, tails.tolist(), strict=True)
        )


def parts_of(adapted: Any) -> tuple[Any, Any]:
    """(what is called, the Hugging Face model inside) of an adapted model, or of one that nothing is on.

    Raises:
        EngineError: the model carries an adapter, and only the model was given.
    """
    if not isinstance(adapted, PreTrainedModel):
        return adapted.model, adapted.base
    if hasattr(adapted, "bem_runtime"):
        raise EngineError(
            "this model carries an adapter: give the engine what bem.attach, load or mount returned."
        )
    return adapted, adapted


def acts_of(adapted: Any) -> Acts:
    """What acts on the model for a sequence that begins now.

    Raises:
        EngineError: its experts are switched off, or train.
    """
    if not isinstance(adapted, Attached):
        base = parts_of(adapted)[1]
        last = [[c.layer.block, c.identity] for c in clamps_of(base)]
        config = {"variant": "none"} | ({"last": last} if last else {})
        version = Version(base_digest(base), config, {}, {})
        return Acts(version, version.digest, None, None, base.dtype)
    wiring, version = adapted.base.bem_runtime.wiring, adapted.version
    if isinstance(adapted, Mounted):
        if wiring is None or adapted.trains == "experts":
            raise EngineError("the experts are switched off or train: finish that first.")
        return Acts(version, _decides(version), adapted.pack, wiring, adapted.base.dtype)
    acting = None if wiring is None else wiring.acting()
    return Acts(version, version.digest, acting, wiring, adapted.base.dtype)


def acts_of_shadow(adapted: Mounted, shadow: Mounted) -> Acts:
    """What a shadow would make act on the model, without being adopted; training the shadow later changes
    nothing of it.

    Raises:
        AttachError: it is no shadow of this model, or its weights are not finite.
    """
    pack, version = adapted.pack_of(shadow), shadow.version
    wiring = adapted.base.bem_runtime.wiring
    return Acts(version, _decides(version), pack, wiring, adapted.base.dtype)


def _decides(version: Version) -> str:
    """Digest of what a router's decisions depend on beside what was read and said."""
    decides = [version.weights["router"], dict(version.config), version.base]
    sizes = {site: [size.rank, size.scale] for site, size in version.sites.items()}
    return sha256_json([*decides, sizes])
