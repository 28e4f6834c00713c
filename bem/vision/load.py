"""Towers by name: `tiny`, or a folder of a CLIP or SigLIP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bem.errors import CheckpointError
from bem.vision import tiny
from bem.vision.hf import KINDS, HFTower
from bem.vision.tower import VisionTower


def load_tower(name: str | Path = "tiny", concepts: Sequence[str] = ()) -> VisionTower:
    """A tower.

    Args:
        name: `tiny`, a folder of one that scripts/train_vision.py wrote, or a folder of a CLIP or SigLIP as
            transformers saves it, its tokenizer included.
        concepts: phrases that a CLIP or SigLIP describes pictures by, 16 at most; `tiny` has its own.
    Raises:
        CheckpointError: no such folder, or one that holds none of these; concepts for `tiny`.
    """
    folder = tiny.FOLDER if str(name) == "tiny" else Path(name)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no vision tower {str(name)!r}: {type(error).__name__}. Give `tiny`, or a local folder of a CLIP or SigLIP."
        ) from None
    if config.get("model_type") in KINDS:
        return HFTower(folder, concepts)
    if concepts:
        raise CheckpointError("a tiny tower has concepts of its own: leave `concepts` out.")
    return tiny.TinyTower(folder)
