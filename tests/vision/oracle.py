"""A tower that finds pure colours by comparing pixels: what the shipped one should see, without a network."""

import numpy as np
import torch

from bem.vision.scenes import COLOURS
from bem.vision.tower import Features

PATCH = 20


class ColourTower:
    """A patch of 20 x 20 pixels shows a colour as far as its pixels have exactly that colour."""

    encoder_id = "colours@1"
    concepts = tuple(COLOURS)

    def encode(self, images):
        cells = torch.stack([torch.from_numpy(i).float() for i in images])
        n, h, w, _ = cells.shape
        cells = cells.view(n, h // PATCH, PATCH, w // PATCH, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
        patches = cells.reshape(n, -1, PATCH * PATCH * 3)
        salient = patches.std(-1) > 0
        strangeness = (patches.std(-1).amax(1) > 120).float() * 3
        return Features(
            summary=patches.mean(1),
            patches=patches,
            grid=(h // PATCH, w // PATCH),
            valid=torch.ones(patches.shape[:2], dtype=torch.bool),
            salient=salient | (patches.mean(-1) != 211),
            strangeness=strangeness,
            blank=patches.std((1, 2)) == 0,
            encoder_id=self.encoder_id,
        )

    def support(self, features, phrases):
        found = []
        for phrase in phrases:
            colour = COLOURS.get(phrase.split()[0])
            if colour is None:
                found.append(torch.full(features.valid.shape, torch.nan))
                continue
            pixels = features.patches.view(*features.valid.shape, -1, 3)
            found.append((pixels == torch.tensor(colour)).all(-1).float().mean(-1))
        return torch.stack(found, -1)


def tiles(*colours, columns=2):
    """A picture of one tile of 20 x 20 pixels per colour; "": grey."""
    rgb = [COLOURS.get(colour, (211, 211, 211)) for colour in colours]
    grid = np.array(rgb, np.uint8).reshape(-1, columns, 3)
    return grid.repeat(PATCH, 0).repeat(PATCH, 1)
