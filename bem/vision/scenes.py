"""Scenes of coloured shapes, drawn exactly: what the tiny tower learns from, and the pictures of NLVR.

A scene is a row of boxes of 100 x 100 pixels with a gap of 50 between them, as in NLVR (Suhr et al. 2017); a
thing is a shape of one colour inside a box, 10 to 30 pixels large, and things do not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bem.errors import DataError

Picture = NDArray[np.uint8]
"""(height, width, 3), RGB."""
COLOURS = {
    "yellow": (255, 240, 0),
    "black": (0, 0, 0),
    "blue": (0, 153, 255),
    "red": (220, 30, 30),
    "green": (20, 150, 60),
}
SHAPES = ("circle", "square", "triangle")
NAMES, SIZES = tuple(COLOURS), (10, 15, 20, 25, 30)
HEX = {"#0099ff": "blue"}
"""As NLVR's files write a colour."""
BOX, GAP = 100, 50
BOX_GREY, GAP_GREY = 211, 255
FINE = 3
"""Subpixels along each side: edges are not jagged."""


@dataclass(frozen=True)
class Thing:
    """A shape in a box; x and y are of its bounding box's top left corner, in pixels."""

    shape: str
    colour: str
    x: int
    y: int
    size: int

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"


Scene = tuple[tuple[Thing, ...], ...]
"""The things of each box."""


def width_of(boxes: int) -> int:
    """Pixels of a row of boxes."""
    return boxes * BOX + (boxes - 1) * GAP


def scene_of(boxes: Sequence[Sequence[Sequence[Any]]]) -> Scene:
    """A scene as `vision_nlvr` writes it: [shape, colour, x, y, size] of each thing of each box.

    Raises:
        DataError: an unknown shape or colour, or numbers that are none.
    """
    found = []
    for box in boxes:
        try:
            things = tuple(
                Thing(s, HEX.get(str(c).lower(), str(c).lower()), int(x), int(y), int(n))
                for s, c, x, y, n in box
            )
        except (TypeError, ValueError) as error:
            raise DataError(
                f"a thing is [shape, colour, x, y, size], found {box!r:.80}."
            ) from error
        for thing in things:
            if thing.shape not in SHAPES or thing.colour not in COLOURS:
                raise DataError(
                    f"unknown thing {thing.name!r}: shapes are {', '.join(SHAPES)}; colours {', '.join(COLOURS)}."
                )
        found.append(things)
    return tuple(found)


def draw(
    scene: Scene, rng: np.random.Generator | None = None, box: int = BOX_GREY, gap: int = GAP_GREY
) -> Picture:
    """The picture of a scene, (100, `width_of`(boxes), 3).

    Args:
        rng: varies colours a little and adds faint noise; None: exact.
        box, gap: grey levels of the boxes and of what is between them.
    """
    canvas = np.full((BOX, width_of(len(scene)), 3), gap, np.float32)
    for number, things in enumerate(scene):
        left = number * (BOX + GAP)
        canvas[:, left : left + BOX] = box
        for thing in things:
            colour = np.array(COLOURS[thing.colour], np.float32)
            if rng is not None:
                colour = colour + rng.normal(0, 8, 3)
            _paint(canvas[:, left : left + BOX], thing, colour)
    if rng is not None:
        noise = rng.standard_normal(canvas.shape, np.float32)
        canvas += np.float32(rng.uniform(0, 3)) * noise
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _paint(canvas: NDArray[np.float32], thing: Thing, colour: NDArray[np.floating]) -> None:
    mask = _mask(thing.shape, thing.size)
    target = canvas[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]
    mask = mask[: target.shape[0], : target.shape[1], None]  # NLVR lets some touch the edge
    target += mask * (colour - target)


@cache
def _mask(shape: str, size: int) -> NDArray[np.float32]:
    """Share of each pixel that a shape covers (size, size)."""
    fine = (np.arange(size * FINE) + 0.5) / (size * FINE)
    y, x = fine[:, None], fine[None]
    if shape == "square":
        inside = np.ones((size * FINE, size * FINE))
    elif shape == "circle":
        inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25
    else:
        inside = np.abs(x - 0.5) <= y / 2
    return inside.reshape(size, FINE, size, FINE).mean((1, 3)).astype(np.float32)


def draw_scene(rng: np.random.Generator, boxes: int = 3, most: int = 8) -> Scene:
    """A random scene: scattered things of mixed sizes, or towers of squares on the floor, as NLVR has both.

    Args:
        most: things in a box at most.
    """
    return tuple(
        _tower(rng) if rng.random() < 0.25 else _scattered(rng, int(rng.integers(0, most + 1)))
        for _ in range(boxes)
    )


def _scattered(rng: np.random.Generator, number: int) -> tuple[Thing, ...]:
    taken = np.zeros((BOX, BOX), bool)
    things: list[Thing] = []
    few = rng.permutation(len(COLOURS))[: int(rng.integers(1, len(COLOURS) + 1))]
    for _ in range(4 * number):
        size = SIZES[rng.integers(len(SIZES))]
        x, y = (int(v) for v in rng.integers(0, BOX - size + 1, 2))
        if taken[y : y + size, x : x + size].any():
            continue
        taken[max(0, y - 1) : y + size + 1, max(0, x - 1) : x + size + 1] = True
        shape, colour = SHAPES[rng.integers(len(SHAPES))], NAMES[few[rng.integers(len(few))]]
        things.append(Thing(shape, colour, x, y, size))
        if len(things) == number:
            break
    return tuple(things)


def _tower(rng: np.random.Generator) -> tuple[Thing, ...]:
    """Squares on each other, one or two towers side by side."""
    size, x, things = 20, int(rng.integers(0, BOX - 20)), []
    for at in (x, x + size + 1)[: int(rng.integers(1, 3))]:
        for level in range(int(rng.integers(1, 5))):
            if at + size <= BOX:
                y = BOX - size - level * (size + 1)
                things.append(Thing("square", NAMES[rng.integers(len(NAMES))], at, y, size))
    return tuple(things)
