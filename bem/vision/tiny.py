"""The shipped tower: a small convolutional network that finds coloured shapes, trained on drawn scenes.

    patch    8 x 8 pixels; P(a thing's centre is here), P(its colour), P(its shape)
    support  s(patch, "yellow circle") = P(thing) * P(yellow) * P(circle)

It knows five colours and three shapes between 10 and 30 pixels on a grey ground, and nothing else: its card says
how well. What does not look like that is not judged: it lies beyond a limit that 99 % of its own scenes stay below
(split-conformal), either of the patches' Mahalanobis distance or of the doubt about what is a thing,

    doubt = sum over patches of p (1 - p) / (1/2 + sum of p)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from bem.errors import CheckpointError
from bem.vision.scenes import COLOURS, SHAPES, Picture
from bem.vision.tower import Features, patch_deviation
from bem.vision.usual import Usual

FOLDER = Path(__file__).parent / "tiny-tower"
CONFIG, WEIGHTS, FORMAT = "config.json", "model.safetensors", 1
PATCH, HEIGHT, MOST_WIDTH, WIDTH = 8, 104, 400, 64
PIXEL_STATISTICS = 7
THINGS = ("thing", "object", "item", "shape", "something")
"""Words for any shape."""
ALIKE = {"block": "square", "box": "square", "disc": "circle", "dot": "circle"}
FLAT = 2.0
"""Standard deviation, of 255, below which every patch of a blank picture stays."""


class TinyNet(nn.Module):
    """Pixels to patches of width 64, and the heads that read them."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (
            (3, 24, 5, 2),
            (24, 32, 3, 2),
            (32, 48, 3, 2),
            (48, WIDTH, 3, 1),
            (WIDTH, WIDTH, 3, 1),
        )
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o))
            for i, o, k, s in sizes
        )
        self.heads = nn.Linear(WIDTH, 1 + len(COLOURS) + len(SHAPES))

    def forward(self, pixels: Tensor) -> Tensor:
        """(images, 3, height, width) in [-1, 1] to (images, patches, 64)."""
        for layer in self.layers:
            pixels = F.relu(layer(pixels))
        return pixels.flatten(2).mT

    def probabilities(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a thing's centre (..., 1), of its colour (..., 5), of its shape (..., 3)."""
        thing, colour, shape = self.heads(hidden).split([1, len(COLOURS), len(SHAPES)], -1)
        return thing.sigmoid(), colour.softmax(-1), shape.softmax(-1)


class TinyTower:
    """The tower of `tiny-tower/`, or of another folder that scripts/train_vision.py wrote.

    Raises:
        CheckpointError: missing, damaged or foreign files.
    """

    concepts = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

    def __init__(self, folder: Path = FOLDER):
        self.net = TinyNet().eval()
        try:
            self.config = json.loads((folder / CONFIG).read_text("utf-8"))
            raw = (folder / WEIGHTS).read_bytes()
            digest = sha256(raw).hexdigest()
            if self.config["format"] != FORMAT or self.config["sha256"] != digest:
                raise CheckpointError(
                    f"{folder}: {WEIGHTS} is not what {CONFIG} describes (format {self.config['format']}, here {FORMAT}): "
                    "install the package again, or train with scripts/train_vision.py."
                )
            tensors = {name: value.float() for name, value in load(raw).items()}
            limit = float(self.config["limit"])
            self.usual = Usual(tensors.pop("centre"), tensors.pop("whiten"), limit)
            self.doubt = float(self.config["doubt"])
            self.net.load_state_dict(tensors, strict=False)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} holds no vision tower that can be read: {type(error).__name__} {error}."
            ) from None
        limits = f"{digest} {limit} {self.doubt}"
        self._id = f"tiny@{sha256(limits.encode()).hexdigest()[:12]}"

    @property
    def encoder_id(self) -> str:
        """See `VisionTower`."""
        return self._id

    def encode(self, images: Sequence[Picture]) -> Features:
        """See `VisionTower`. A picture larger than 400 x 104 pixels is made smaller, one under 64 pixels larger."""
        pixels, valid = batch_of(images)
        with torch.inference_mode():
            patches = described(self.net, pixels)
            hidden = patches[..., :WIDTH]
            thing = self.net.probabilities(hidden)[0][..., 0] * valid
            far = (self.usual.distance(patches) * valid).sum(1) / valid.sum(1)
            flat = patch_deviation(pixels * 127.5, PATCH).masked_fill(~valid, 0).amax(1) < FLAT
            shown = valid[..., None].float()
            mean = (patches * shown).sum(1) / shown.sum(1)
            most = hidden.masked_fill(~valid[..., None], 0).amax(1)
        return Features(
            summary=torch.cat([mean, most], -1),
            patches=patches,
            grid=(HEIGHT // PATCH, pixels.shape[3] // PATCH),
            valid=valid,
            salient=thing > 0.5,
            strangeness=torch.maximum(far / self.usual.limit, doubt_of(thing) / self.doubt),
            blank=flat,
            encoder_id=self._id,
        )

    def support(self, features: Features, phrases: Sequence[str]) -> Tensor:
        """See `VisionTower`: it knows a colour, a shape, or both."""
        with torch.inference_mode():
            thing, colour, shape = self.net.probabilities(features.patches[..., :WIDTH])
        found = []
        for phrase in phrases:
            named = _named(phrase)
            if named is None:
                found.append(torch.full_like(thing[..., 0], torch.nan))
                continue
            seen = thing[..., 0] * features.valid
            if named[0] is not None:
                seen = seen * colour[..., named[0]]
            if named[1] is not None:
                seen = seen * shape[..., named[1]]
            found.append(seen)
        return torch.stack(found, -1)


def _named(phrase: str) -> tuple[int | None, int | None] | None:
    """(colour, shape) that a phrase names, None: any; None: it names something else."""
    colours, words = list(COLOURS), phrase.split()
    colour = colours.index(words.pop(0)) if words and words[0] in colours else None
    word = ALIKE.get(words[0], words[0]) if len(words) == 1 else ""
    if word in SHAPES:
        return colour, SHAPES.index(word)
    known = word in THINGS or (not words and colour is not None)
    return (colour, None) if known else None


def doubt_of(thing: Tensor) -> Tensor:
    """How undecided a picture leaves it what is a thing (images,); thing: probabilities (images, patches)."""
    return (thing * (1 - thing)).sum(1) / (0.5 + thing.sum(1))


def described(net: TinyNet, pixels: Tensor) -> Tensor:
    """Patches of the network, and beside each what its pixels say: mean, deviation and their spread."""
    cells = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(4)  # (n, 3, h, w, 64)
    mean, deviation = cells.mean(-1), cells.std(-1, correction=0)
    edges = (cells.diff(dim=-1).abs().mean(-1)).amax(1, keepdim=True)
    statistics = torch.cat([mean, deviation, edges], 1).flatten(2).mT
    return torch.cat([net(pixels), statistics], -1)


def batch_of(images: Sequence[Picture]) -> tuple[Tensor, Tensor]:
    """Pixels (images, 3, 104, width) in [-1, 1], and which patches are picture, bool (images, patches)."""
    fitted = [_fitted(image) for image in images]
    width = -(-max(image.shape[1] for image in fitted) // PATCH) * PATCH
    pixels, valid = [], []
    for image in fitted:
        h, w = image.shape[:2]
        padded = np.pad(image, ((0, HEIGHT - h), (0, width - w), (0, 0)), mode="edge")
        pixels.append(torch.from_numpy(padded.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1)
        rows = torch.arange(HEIGHT // PATCH) * PATCH + PATCH / 2 <= max(
            h, PATCH / 2
        )  # the thinnest has one
        columns = torch.arange(width // PATCH) * PATCH + PATCH / 2 <= max(w, PATCH / 2)
        valid.append((rows[:, None] & columns[None]).flatten())
    return torch.stack(pixels), torch.stack(valid)


def _fitted(image: Picture) -> Picture:
    h, w = image.shape[:2]
    if 64 <= h <= HEIGHT and w <= MOST_WIDTH:
        return image
    scale = min(HEIGHT / h, MOST_WIDTH / w)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
