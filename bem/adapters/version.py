"""What acts, under one digest: a `Version` names checkpoints, owns caches and stands in every measurement.

Weights are named by their values: a tensor in bfloat16 and its exact copy in float32 have one digest. A
base is hashed once, and again only when one of its tensors changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from bem.adapters.names import clean_name, innermost
from bem.adapters.quantised import plain_tensors
from bem.bases import int4
from bem.errors import CheckpointError
from bem.files import sha256_json
from bem.variants.digest import weights_digest
from bem.variants.watch import Watch


@dataclass(frozen=True)
class SiteSize:
    """How large the update at a site is: part of an adapter's state, as it may differ from site to site."""

    rank: int
    scale: float
    """Factor of the update, alpha / rank in LoRA's terms."""


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model this is."""

    digest: str
    """sha256 over names, shapes and values of its weights, whatever is attached to it."""
    shapes: str
    """sha256 over names and shapes alone: equal for one base in two dtypes."""
    dtype: str
    """Of its floating point weights, as "float32"; several are joined by "+"."""


@dataclass(frozen=True, eq=False)
class Version:
    """What acts in an adapted model. Two versions with one digest give the same logits."""

    base: str
    """Digest of the base, see `base_digest`."""
    config: Mapping[str, Any]
    """The settings on which outputs depend once the weights are given. Plain JSON."""
    sites: Mapping[str, SiteSize]
    """Site name -> rank and scale."""
    weights: Mapping[str, str]
    """Weight group (an expert, the router, a static adapter) -> its `weights_digest`."""
    digest: str = field(init=False)
    """sha256 over all of it."""

    def __post_init__(self) -> None:
        for name in ("config", "sites", "weights"):
            values = dict(sorted(getattr(self, name).items()))
            object.__setattr__(self, name, MappingProxyType(values))
        # An alpha that was written as a float may come back one double bit away from its scale.
        sizes = {s: [z.rank, float(np.float32(z.scale))] for s, z in self.sites.items()}
        parts = [self.base, dict(self.config), sizes, dict(self.weights)]
        object.__setattr__(self, "digest", sha256_json(parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Version) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Version, (self.base, dict(self.config), dict(self.sites), dict(self.weights))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "base": self.base,
            "config": dict(self.config),
            "sites": {s: {"rank": z.rank, "scale": z.scale} for s, z in self.sites.items()},
            "weights": dict(self.weights),
            "digest": self.digest,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Version:
        """The version that `to_dict` wrote.

        Raises:
            CheckpointError: a part is missing, or the parts do not make the digest.
        """
        try:
            sites = {s: SiteSize(z["rank"], z["scale"]) for s, z in values["sites"].items()}
            version = Version(values["base"], values["config"], sites, values["weights"])
            digest = values["digest"]
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"this is no version: {type(error).__name__} {error}. A version has base, config, sites, "
                "weights and digest."
            ) from None
        if version.digest != digest:
            raise CheckpointError(
                f"the version's parts make the digest {version.digest[:12]}, it says {str(digest)[:12]}: it "
                "was changed after it was written."
            )
        return version


def base_digest(model: nn.Module) -> str:
    """sha256 over names, shapes and values of a base's parameters and persistent buffers; tied ones once,
    quantised ones as the integers and scales that they consist of.

    The same whatever is attached, whether or not the model is compiled or wrapped by PEFT. Computed
    once per loaded base and kept until one of its tensors is another, or was written to. (Torch counts
    no writes through `.data`.)
    """
    return base_identity(model).digest


_bases: WeakKeyDictionary[nn.Module, _LastLook] = WeakKeyDictionary()


def base_identity(model: nn.Module) -> BaseIdentity:
    """Digest, shapes and dtype of a base; kept as `base_digest` says."""
    base = innermost(model)
    tensors = dict(_base_tensors(base))
    look = _bases.get(base)
    if look is None or not look.same(tensors):
        look = _bases[base] = _LastLook(tensors, _identify(tensors))
    return look.identity


class DigestCache:
    """Digests of groups of weights, computed anew when one of their tensors changes.

    Writes through `.data`, which torch does not count, show in the sum of the tensors' bits.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[Watch, tuple[object, ...], str]] = {}

    def __call__(self, group: str, named: Mapping[str, Tensor]) -> str:
        """`weights_digest(named)`; `group` names it in the cache."""
        watch, look, digest = self._held.get(group, (Watch(), (), ""))
        now = (*named, *_sums_of_bits(list(named.values())))
        if watch.changed(*named.values()) or look != now:
            digest = weights_digest(named)
            self._held[group] = (watch, now, digest)
        return digest


def _sums_of_bits(tensors: list[Tensor]) -> list[int]:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [t.detach().reshape(-1).view(integers[t.element_size()]).sum() for t in tensors]
    return torch.stack(sums).tolist() if sums else []


class _LastLook:
    """The tensors of a base as they were, keeping none of them alive."""

    def __init__(self, tensors: Mapping[str, Tensor], identity: BaseIdentity):
        self.identity = identity
        self._refs = [weakref.ref(t) for t in tensors.values()]
        self._states = [(name, *_state(t)) for name, t in tensors.items()]

    def same(self, tensors: Mapping[str, Tensor]) -> bool:
        """None is another one or was written to."""
        return (
            self._states == [(name, *_state(t)) for name, t in tensors.items()]
            and all(ref() is t for ref, t in zip(self._refs, tensors.values(), strict=True))
        )  # fmt: skip


def _state(tensor: Tensor) -> tuple[object, ...]:
    writes = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), writes, tuple(tensor.shape), tensor.dtype


def _identify(tensors: Mapping[str, Tensor]) -> BaseIdentity:
    plain = {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in int4.HELD}
    shapes = sha256_json([[name, list(t.shape)] for name, t in sorted(plain.items())])
    dtypes = {str(t.dtype).removeprefix("torch.") for t in plain.values()}
    floating = {d for d in dtypes if "float" in d}
    form = ["int4"] if len(plain) < len(tensors) else []
    dtype = "+".join([*form, *sorted(floating or dtypes)])
    return BaseIdentity(weights_digest(tensors), shapes, dtype)


def _base_tensors(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what belongs to the base, each tensor once, under its name before attaching."""
    seen: set[int] = set()
    for name, module in _base_modules(base, ""):
        own: Iterable[tuple[str, Tensor | None]] = [
            *module._parameters.items(),
            *(b for b in module._buffers.items() if b[0] not in module._non_persistent_buffers_set),
        ]
        for key, tensor in own:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield from plain_tensors(clean_name(f"{name}.{key}".lstrip(".")), tensor, module)


def _base_modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The module and those below it, without what PEFT or BEM added."""
    children = module._modules
    if hasattr(
        module, "adapter_layer_names"
    ):  # PEFT's mark of what it wraps around a layer, ours too
        children = {k: m for k, m in children.items() if k in ("base_layer", "original_module")}
    yield name, module
    for key, child in children.items():
        if child is not None:
            yield from _base_modules(child, f"{name}.{key}")
