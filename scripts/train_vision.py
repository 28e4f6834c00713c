"""Train the shipped vision tower on scenes that are drawn on the way.

    python scripts/train_vision.py --out bem/vision/tiny-tower --state vision.pt

Nothing is read but numbers of a generator. A run that was stopped goes on from `--state`; the scenes of a step depend
on its number alone, so that it ends where one that was not stopped would have. One in eight pictures is no scene (noise,
stripes, ramps, blots): nothing is to be found there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from bem import files
from bem.vision import tiny
from bem.vision.scenes import BOX_GREY, COLOURS, SHAPES, Picture, Scene, draw, draw_scene
from bem.vision.tiny import PATCH, WIDTH, TinyNet, batch_of, described, doubt_of
from bem.vision.usual import fit_usual

BATCH, PEAK, WARM_UP, EVERY = 32, 4e-3, 100, 100
SEED, SEED_CALIBRATION = 1, 1 << 20
REFERENCE, COVERAGE = 200, 0.99
"""Scenes that the Gaussian is fitted to, as many that set its limit, and the share that stays below it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=tiny.FOLDER)
    parser.add_argument(
        "--state", type=Path, required=True, help="file that a stopped run goes on from"
    )
    parser.add_argument("--steps", type=int, default=650)
    args = parser.parse_args()
    torch.set_num_threads(1)
    net, spent = train(args.state, args.steps)
    write(args.out, net, args.steps, spent)


def train(path: Path, steps: int) -> tuple[TinyNet, float]:
    """The trained network, and CPU seconds spent."""
    torch.manual_seed(SEED)
    net = TinyNet().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(net.parameters(), lr=PEAK, weight_decay=0.01)
    begun, spent = 0, 0.0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        begun, spent = state["step"], state["spent"]
    started = time.process_time() - spent
    net.train()
    for step in range(begun, steps):
        rate = PEAK * min(1.0, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        pixels, wanted = drawn_batch(np.random.default_rng([SEED, step]))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net, pixels, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % EVERY == 0:
            spent = time.process_time() - started
            print(f"step {step + 1} loss {loss.item():.4f} cpu {spent:.0f} s", flush=True)
            torch.save({"net": net.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1,
                        "spent": spent}, path.with_suffix(".new"))  # fmt: skip
            path.with_suffix(".new").replace(path)
    return net.to(memory_format=torch.contiguous_format).eval(), spent


def drawn_batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pixels, and for each patch what is there: (thing or not, colour, shape); -1: no thing."""
    pictures: list[Picture] = []
    wanted = []
    for place in range(BATCH):
        if place % 8 == 7:
            pictures.append(no_scene(rng))
            scene: Scene = ((),)
        else:
            scene = draw_scene(rng, boxes=1)
            grey = int(np.clip(rng.normal(BOX_GREY, 12), 170, 250))
            pictures.append(draw(scene, rng, box=grey))
        wanted.append(_cells(scene))
    return batch_of(pictures)[0], torch.stack(wanted)


def _cells(scene: Scene) -> Tensor:
    side = tiny.HEIGHT // PATCH
    cells = torch.full((side, side, 2), -1)
    for thing in scene[0]:
        y, x = (thing.y + thing.size // 2) // PATCH, (thing.x + thing.size // 2) // PATCH
        cells[y, x] = torch.tensor([list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)])
    return cells.flatten(0, 1)


def no_scene(rng: np.random.Generator) -> Picture:
    """Noise of some grain, stripes, a ramp or blots, in colours of their own."""
    kind, side = int(rng.integers(4)), 100
    if kind == 0:
        grain = int(rng.choice([1, 2, 4, 10, 25]))
        small = rng.uniform(0, 255, (side // grain, side // grain, 3))
        return np.repeat(np.repeat(small, grain, 0), grain, 1).astype(np.uint8)
    one, other = rng.uniform(0, 255, (2, 3))
    y, x = np.mgrid[:side, :side] / side
    along = np.cos(a := rng.uniform(0, 6.3)) * x + np.sin(a) * y
    if kind == 1:
        share = 0.5 + 0.5 * np.sin(along * rng.uniform(6, 120))
    elif kind == 2:
        share = along - along.min()
    else:
        waves = rng.normal(0, 3, (6, 2))
        share = 1 / (1 + np.exp(-sum(np.sin(6.3 * (w[0] * x + w[1] * y)) for w in waves)))
    share = np.clip(share, 0, 1)[..., None]
    return np.clip(one * share + other * (1 - share), 0, 255).astype(np.uint8)


def loss_of(net: TinyNet, pixels: Tensor, wanted: Tensor) -> Tensor:
    thing, colour, shape = net.heads(net(pixels)).float().split([1, len(COLOURS), len(SHAPES)], -1)
    there = wanted[..., 0] >= 0
    found = F.binary_cross_entropy_with_logits(thing[..., 0], there.float(), reduction="none")
    loss = 20 * found.mean()
    return (
        loss
        + F.cross_entropy(colour[there], wanted[..., 0][there])
        + F.cross_entropy(shape[there], wanted[..., 1][there])
    )


@torch.no_grad()
def write(folder: Path, net: TinyNet, steps: int, spent: float) -> None:
    """Fit what is usual, and write the tower."""
    rng = np.random.default_rng(SEED_CALIBRATION)
    kept = {k: v.half() for k, v in net.state_dict().items() if not k.endswith("batches_tracked")}
    net.load_state_dict({k: v.float() for k, v in kept.items()}, strict=False)  # as it will be read
    scenes = [draw_scene(rng, int(rng.integers(1, 4))) for _ in range(2 * REFERENCE)]
    pictures = [
        draw(s, rng if i % 2 else None, box=int(np.clip(rng.normal(BOX_GREY, 12), 170, 250)))
        for i, s in enumerate(scenes)
    ]
    seen = [_valid_patches(net, picture) for picture in pictures]
    usual = fit_usual(seen[:REFERENCE], seen[REFERENCE:], COVERAGE)
    doubts = sorted(
        float(doubt_of(net.probabilities(patches[None, :, :WIDTH])[0][..., 0]))
        for patches in seen[REFERENCE:]
    )
    doubt = doubts[min(len(doubts), math.ceil(COVERAGE * (len(doubts) + 1))) - 1]
    raw = save({**kept, "centre": usual.centre, "whiten": usual.whiten})
    about = {"steps": steps, "batch": BATCH, "cpu_seconds": round(spent), "seed": SEED,
             "parameters": sum(p.numel() for p in net.parameters())}  # fmt: skip
    config = {
        "format": tiny.FORMAT,
        "sha256": sha256(raw).hexdigest(),
        "limit": usual.limit,
        "doubt": doubt,
        "about": about,
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write_bytes(folder / tiny.WEIGHTS, raw)
    files.write_json(folder / tiny.CONFIG, config)
    print(json.dumps({**config, "bytes": len(raw)}))


def _valid_patches(net: TinyNet, picture: Picture) -> Tensor:
    pixels, valid = batch_of([picture])
    return described(net, pixels)[0, valid[0]]


if __name__ == "__main__":
    main()
