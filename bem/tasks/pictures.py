"""Tasks with pictures: rows that a picture goes with, and controls in which it says nothing.

In a conversation whose picture decides the skill the text shows no cue; one of the things in the picture is the
skill's sign, the others are nobody's.

    shown      the picture of the row's own skill          blank   a grey one
    shuffled   that of another row                         noise   every pixel drawn
    none       no picture: the text alone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bem.errors import DataError
from bem.files import json_lines
from bem.training.example import Example
from bem.vision.eyes import Eyes
from bem.vision.images import decode, from_data_url
from bem.vision.scenes import (
    BOX,
    BOX_GREY,
    SIZES,
    Picture,
    Scene,
    Thing,
    draw,
    draw_scene,
    scene_of,
)

Condition = Literal["shown", "shuffled", "blank", "noise", "none"]
SIGNS = ("yellow circle", "blue square", "red triangle", "green circle", "black square")
"""Of the skills, in their order."""


@dataclass(frozen=True)
class Drawing:
    """A hand-drawn character of `vision_omniglot`."""

    picture: Picture
    """Black on white (35, 35, 3)."""
    alphabet: str
    character: str
    drawer: int


def sighted(
    rows: Sequence[Example], pictures: Sequence[Picture | None], eyes: Eyes
) -> list[Example]:
    """Rows that are told what is seen on their pictures, beside what the user says last."""
    seen = eyes.look_at(pictures, [row.prompt for row in rows])
    return [
        replace(row, vision=() if picture is None else record.features())
        for row, picture, record in zip(rows, pictures, seen, strict=True)
    ]


def pictures_for(
    skills: Sequence[int], condition: Condition, seed: int, signs: Sequence[str] = SIGNS
) -> list[Picture | None]:
    """A picture for each row, by its skill's place in `signs`.

    Raises:
        DataError: a skill without a sign.
    """
    if skills and max(skills) >= len(signs):
        raise DataError(f"skill {max(skills)} has no sign: there are {len(signs)}.")
    rng = np.random.default_rng([seed, 17])
    if condition == "none":
        return [None] * len(skills)
    if condition == "blank":
        return [np.full((BOX, BOX, 3), BOX_GREY, np.uint8) for _ in skills]
    if condition == "noise":
        return [rng.integers(0, 256, (BOX, BOX, 3)).astype(np.uint8) for _ in skills]
    shown = [draw((_signed(signs[skill], signs, rng),), rng) for skill in skills]
    if condition == "shown":
        return list(shown)
    return [shown[at] for at in np.random.default_rng([seed, 18]).permutation(len(shown))]


def _signed(sign: str, signs: Sequence[str], rng: np.random.Generator) -> tuple[Thing, ...]:
    """Things of which one is the sign and none is another's."""
    (things,) = draw_scene(rng, boxes=1, most=6)
    kept = [thing for thing in things if thing.name not in signs]
    colour, shape = sign.split()
    while True:
        size = SIZES[rng.integers(1, len(SIZES))]
        x, y = (int(v) for v in rng.integers(0, BOX - size + 1, 2))
        one = Thing(shape, colour, x, y, size)
        if not any(_touch(one, other) for other in kept):
            return (*kept, one)
        kept = kept[:-1] if rng.random() < 0.05 else kept  # a full box makes room


def _touch(one: Thing, other: Thing) -> bool:
    apart_x = one.x > other.x + other.size or other.x > one.x + one.size
    apart_y = one.y > other.y + other.size or other.y > one.y + one.size
    return not (apart_x or apart_y)


def scene_of_row(row: Example) -> Scene:
    """The scene of a row of `vision_nlvr`.

    Raises:
        DataError: the row has none.
    """
    if "boxes" not in row.meta:
        raise DataError(f"Row {row.id!r} has no meta.boxes: it is none of vision_nlvr.")
    return scene_of(row.meta["boxes"])


def read_omniglot(path: Path) -> list[Drawing]:
    """The drawings of `vision_omniglot.train.npz`.

    Raises:
        DataError: no such file, or other arrays in it.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            bits, *named = (held[name] for name in ("bits", "alphabet", "character", "drawer"))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} is no vision_omniglot: {type(error).__name__} {error}.") from None
    ink = np.unpackbits(bits, axis=2)[:, :, :35]
    return [
        Drawing(
            np.repeat(255 * (1 - drawn)[..., None], 3, -1).astype(np.uint8), str(a), str(c), int(d)
        )
        for drawn, a, c, d in zip(ink, *named, strict=True)
    ]


def rows_with_images(path: Path, eyes: Eyes) -> list[dict[str, Any]]:
    """Rows of a .jsonl file whose `image` (a file beside it, or a data URL) is replaced by what is seen on it.

    Raises:
        DataError: a picture that cannot be read; names the line.
    """
    rows = []
    for number, row in json_lines(path):
        if isinstance(row, dict) and row.get("image") is not None:
            image, text = row["image"], last_words(row)
            try:
                if not isinstance(image, str):
                    raise DataError(f"image must be a file or a data URL, found {image!r:.40}.")
                shown = from_data_url(image) if image.startswith("data:") else _read(path, image)
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}") from None
            row = {k: v for k, v in row.items() if k != "image"}
            row["vision"] = list(eyes.look(shown, text).features())
        rows.append(row)
    return rows


def _read(path: Path, name: str) -> Picture:
    try:
        return decode((path.parent / name).read_bytes())
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}.") from None


def last_words(row: dict[str, Any]) -> str:
    """What the user of a row says last, in any of its forms; "" where it is no text."""
    said = row.get("input") or row.get("prompt") or row.get("messages") or ""
    if isinstance(said, list):
        asked = [m for m in said if isinstance(m, dict) and m.get("role") == "user"]
        said = asked[-1].get("content") if asked else ""
    return said if isinstance(said, str) else ""
