"""The files of a violation detector: weights as safetensors, everything else as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from bem import files
from bem.errors import CheckpointError
from bem.safety.features import BUCKETS

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Category:
    """One kind of violation: P = sigmoid(slope * (weights . features + bias) + intercept)."""

    name: str
    weights: NDArray[np.float32]
    """(2 * BUCKETS,)."""
    bias: float
    slope: float
    intercept: float
    limit: float
    """Of harmless calibration prompts so many lie above it as the conformal level says."""


@dataclass(frozen=True)
class Weights:
    """What a detector needs."""

    categories: tuple[Category, ...]
    idf: NDArray[np.float32]
    words: Mapping[int, float]
    """Digest of a word (see `word_digest`) -> share of the texts with it that were called abusive."""
    about: Mapping[str, Any]
    """How it was trained and calibrated; plain JSON."""


def read_weights(folder: Path) -> Weights:
    """What `write_weights` wrote.

    Raises:
        CheckpointError: missing, damaged or foreign files.
    """
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        raw = (folder / WEIGHTS).read_bytes()
        if config["format"] != FORMAT or config["sha256"] != sha256(raw).hexdigest():
            raise CheckpointError(
                f"{folder}: {WEIGHTS} is not what {CONFIG} describes (format {config['format']}, here {FORMAT}): "
                "install the package again, or train with scripts/train_detector.py."
            )
        tensors = load(raw)
        categories = [_category(values, tensors) for values in config["categories"]]
        shares = tensors["word_shares"].astype(np.float32).tolist()
        words = dict(zip(tensors["words"].tolist(), shares, strict=True))
        idf = tensors["idf"].astype(np.float32)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no violation detector that can be read: {type(error).__name__} {error}."
        ) from None
    if idf.shape != (2 * BUCKETS,) or not all(np.isfinite(c.weights).all() for c in categories):
        raise CheckpointError(f"{folder}: weights of the wrong shape, or not finite.")
    return Weights(tuple(categories), idf, words, config["about"])


def write_weights(folder: Path, weights: Weights) -> None:
    """Write config.json and model.safetensors (float16)."""
    tensors: dict[str, np.ndarray] = {
        c.name: c.weights.astype(np.float16) for c in weights.categories
    }
    tensors["idf"] = weights.idf.astype(np.float16)
    tensors["words"] = np.array(sorted(weights.words), dtype=np.uint64)
    shares = [weights.words[word] for word in sorted(weights.words)]
    tensors["word_shares"] = np.array(shares, dtype=np.float16)
    raw = save(tensors)
    numbers = ("name", "bias", "slope", "intercept", "limit")
    config = {
        "format": FORMAT,
        "sha256": sha256(raw).hexdigest(),
        "categories": [{n: getattr(c, n) for n in numbers} for c in weights.categories],
        "about": dict(weights.about),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write_bytes(folder / WEIGHTS, raw)
    files.write_json(folder / CONFIG, config)


def _category(values: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Category:
    return Category(weights=tensors[values["name"]].astype(np.float32), **values)
