"""A safety basis: the directions of one base that no adapter may write into, and how low each may fall.

Per protected decoder block an orthonormal U (d, s), s <= 8, and two marks in the units of `coordinates`: `low`,
below which hardly a harmless token lies, and `high`, where the median of the harmful prompts lies. `fit` makes
one, `protect` puts it on a model. What it does and does not cover stands in docs/safety.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bem import files
from bem.errors import CheckpointError
from bem.files import sha256_json
from bem.variants.digest import weights_digest
from bem.variants.forbidden import Forbidden

FORMAT = 1
CARD, TENSORS = "basis.json", "basis.safetensors"


@dataclass(frozen=True, eq=False)
class ProtectedLayer:
    """The directions behind one decoder block."""

    block: int
    directions: Float[Tensor, "d s"]
    """Orthonormal, float32; harmful prompts lie higher along each."""
    low: Float[Tensor, " s"]
    high: Float[Tensor, " s"]


@dataclass(frozen=True, eq=False)
class SafetyBasis:
    """Of one base."""

    base: str
    """Digest of the base's weights."""
    layers: tuple[ProtectedLayer, ...]
    """Bottom to top."""
    about: Mapping[str, Any]
    """How it was made, what it was accepted on, what is not covered: plain JSON."""

    @cached_property
    def digest(self) -> str:
        """Of base, blocks and numbers."""
        return sha256_json([self.base, weights_digest(self._tensors())])

    def forbidden(self, block: int) -> Forbidden | None:
        """What a writer in a block must leave alone: the directions behind this block and all above it, into
        which the residual stream carries what it writes. None: no protected layer is above."""
        above = [layer.directions.double() for layer in self.layers if layer.block >= block]
        if not above:
            return None
        left, values, _ = torch.linalg.svd(torch.cat(above, 1), full_matrices=False)
        return Forbidden(left[:, values > 1e-6 * values[0]])

    def write(self, folder: Path) -> Path:
        """basis.json and basis.safetensors, whole or not at all.

        Raises:
            CheckpointError: the folder holds anything else, or cannot be written.
        """
        with files.whole_folder(Path(folder), _written, CheckpointError) as work:
            save_file(self._tensors(), work / TENSORS)
            card = {
                "format": FORMAT,
                "base": self.base,
                "digest": self.digest,
                "blocks": [layer.block for layer in self.layers],
                "sha256": files.sha256_file(work / TENSORS),
                "about": dict(self.about),
            }
            files.write_json(work / CARD, card)
        return Path(folder)

    def _tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for layer in self.layers:
            parts = {"directions": layer.directions, "low": layer.low, "high": layer.high}
            named |= {f"{layer.block}.{n}": t.detach().float().cpu().contiguous() for n, t in parts.items()}  # fmt: skip
        return named


def read_basis(folder: str | Path) -> SafetyBasis:
    """What `SafetyBasis.write` wrote.

    Raises:
        CheckpointError: missing, damaged, changed or foreign files.
    """
    folder = Path(folder)
    card = files.read_json(folder / CARD, CheckpointError)
    try:
        if card["format"] != FORMAT or card["sha256"] != files.sha256_file(folder / TENSORS):
            raise CheckpointError(
                f"{folder}: {TENSORS} is not what {CARD} describes: fit the basis again (bem safety fit)."
            )
        tensors = load_file(folder / TENSORS)
        layers = tuple(
            ProtectedLayer(int(b), *(tensors[f"{b}.{n}"] for n in ("directions", "low", "high")))
            for b in card["blocks"]
        )
        basis = SafetyBasis(card["base"], layers, card["about"])
        stated = card["digest"]
    except (
        KeyError,
        TypeError,
        ValueError,
        OSError,
        SafetensorError,
        json.JSONDecodeError,
    ) as error:
        raise CheckpointError(
            f"{folder} holds no safety basis that can be read: {type(error).__name__} {error}."
        ) from None
    if not layers or basis.digest != stated or not _is_finite(tensors):
        raise CheckpointError(f"{folder}: the basis is not the one that its card names.")
    return basis


def _is_finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors.values())


def _written(folder: Path) -> list[str]:
    return [name for name in (CARD, TENSORS) if (folder / name).is_file()]
