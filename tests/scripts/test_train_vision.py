"""The tower's training: a run that was stopped ends where one that was not does, and what it writes is a tower."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bem.errors import CheckpointError
from bem.vision.scenes import COLOURS, SHAPES, draw_scene
from bem.vision.tiny import TinyTower

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import train_vision as script


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(script, "BATCH", 8)
    monkeypatch.setattr(script, "REFERENCE", 20)
    monkeypatch.setattr(script, "EVERY", 2)


def test_a_stopped_run_ends_where_one_that_was_not_does_and_its_tower_loads(tmp_path, monkeypatch):
    whole, _ = script.train(tmp_path / "whole.pt", 4)
    real = script.drawn_batch

    def stopping(rng):
        if rng.bit_generator.state == np.random.default_rng([script.SEED, 3]).bit_generator.state:
            raise KeyboardInterrupt
        return real(rng)

    monkeypatch.setattr(script, "drawn_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        script.train(tmp_path / "parts.pt", 4)
    monkeypatch.setattr(script, "drawn_batch", real)
    parts, _ = script.train(tmp_path / "parts.pt", 4)
    state = parts.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    script.write(tmp_path / "tower", whole, 4, 1.0)
    tower = TinyTower(tmp_path / "tower")
    assert tower.config["about"]["steps"] == 4 and tower.encoder_id.startswith("tiny@")
    (tmp_path / "tower" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="is not what"):
        TinyTower(tmp_path / "tower")


def test_targets_stand_in_the_patch_of_each_things_centre():
    scene = draw_scene(np.random.default_rng(3), boxes=1)
    cells = script._cells(scene)
    assert int((cells[:, 0] >= 0).sum()) == len(scene[0]) > 0
    for thing in scene[0]:
        cell = cells[(thing.y + thing.size // 2) // 8 * 13 + (thing.x + thing.size // 2) // 8]
        assert (list(COLOURS)[cell[0]], SHAPES[cell[1]]) == (thing.colour, thing.shape)
