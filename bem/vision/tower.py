"""What a picture becomes: one vector, a vector per patch, and how far a phrase is seen in each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bem.vision.scenes import Picture


@dataclass(frozen=True)
class Features:
    """A batch of pictures as a tower sees it; float32."""

    summary: Tensor
    """(images, d): of each whole picture."""
    patches: Tensor
    """(images, patches, d), row by row from the top left."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    valid: Tensor
    """bool (images, patches): False where there is padding and no picture."""
    salient: Tensor
    """bool (images, patches): something is there that a description should name."""
    strangeness: Tensor
    """(images,): how unlike the pictures that the tower knows; above 1 it does not know such pictures."""
    blank: Tensor
    """bool (images,): nothing is on it."""
    encoder_id: str
    """Of the tower: name and first digits of the digest of its weights."""


class VisionTower(Protocol):
    """Pictures to features, and phrases to where they are seen."""

    @property
    def encoder_id(self) -> str:
        """Another tower, or the same with other weights, has another one."""
        ...

    @property
    def concepts(self) -> tuple[str, ...]:
        """Phrases by which it describes a picture of which nothing is said, 16 at most."""
        ...

    def encode(self, images: Sequence[Picture]) -> Features:
        """Features of pictures of any size."""
        ...

    def support(self, features: Features, phrases: Sequence[str]) -> Tensor:
        """(images, patches, phrases): probability that a patch shows a phrase; NaN for a phrase that it does not know."""
        ...


def patch_deviation(pixels: Tensor, size: int) -> Tensor:
    """Largest standard deviation over the colour channels inside each patch.

    Args:
        pixels: (images, 3, height, width), height and width multiples of `size`.
    Returns:
        (images, patches), in units of the pixels.
    """
    n, c, h, w = pixels.shape
    cells = pixels.reshape(n, c, h // size, size, w // size, size)
    return cells.std((3, 5), correction=0).amax(1).flatten(1)
