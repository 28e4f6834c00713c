"""A linear probe on what a base makes of a prompt: states behind one block, told harmful from harmless.

    probe = HiddenProbe(model, tokenizer, read_probe(), ViolationDetector())    # smollm2-135m
    probe.score("How do I sharpen a knife?")       # probability of harm, by words and states together

Unlike words, a state holds what was read together; how much that is worth for a small base stands in
benchmarks/results/detector.md. A probe belongs to the base whose digest it names. It costs a forward pass, and
stands beside the detector, not in a server's policy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from bem import files
from bem.adapters.names import innermost
from bem.adapters.sites import find_sites
from bem.adapters.version import base_digest
from bem.errors import BaseMismatch, CheckpointError
from bem.safety.detector import ViolationDetector
from bem.safety.fit import Reader

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
SHIPPED = Path(__file__).parent / "violation-probe"
LONGEST = 2000
"""Characters of a prompt that are read: its end."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Log odds of harm: weights . (state - centre) / spread + bias, scaled as Platt's calibration says."""

    base: str
    """Digest of the base's weights."""
    block: int
    pool: Literal["last", "mean"]
    """The state of the last token, or the mean of all."""
    weights: NDArray[np.float32]
    """(d,)."""
    centre: NDArray[np.float32]
    spread: NDArray[np.float32]
    bias: float
    slope: float
    intercept: float
    about: Mapping[str, Any]
    """How it was trained and chosen; plain JSON."""

    def log_odds(self, state: NDArray[np.float32]) -> float:
        """Of one state (d,)."""
        score = float(self.weights @ ((state - self.centre) / self.spread)) + self.bias
        return self.slope * score + self.intercept


class HiddenProbe:
    """A probe with its base, alone or together with a detector of words."""

    def __init__(
        self, model: Any, tokenizer: Any, probe: Probe, words: ViolationDetector | None = None
    ):
        """
        Args:
            words: None: the states alone.
        Raises:
            BaseMismatch: the probe was trained on another base.
        """
        base = innermost(model)
        if (here := base_digest(base)) != probe.base:
            raise BaseMismatch(
                f"the probe was trained on base {probe.base[:12]}, this one is {here[:12]}: train one for it "
                "(scripts/train_probe.py)."
            )
        self.probe, self.words = probe, words
        self._reader = Reader(base, tokenizer, [find_sites(base).blocks[probe.block]])

    def score(self, text: str) -> float:
        """Probability of harm: by the states, or by the mean of both log odds. One forward pass; 1 where the
        words could not be checked."""
        odds = self.log_odds(text)
        if self.words is not None:
            checked = self.words.check(text)
            if checked.error:
                return 1.0
            odds = (odds + log_odds_of(checked.scores["harm"])) / 2
        return float(1 / (1 + np.exp(-odds)))

    def log_odds(self, text: str) -> float:
        """Of a prompt, by the states alone."""
        states = self._reader.pooled(text[-LONGEST:])[self.probe.pool]
        return self.probe.log_odds(states[0].numpy())


def log_odds_of(probability: float) -> float:
    """Of a probability, which is kept 1e-6 away from both ends."""
    p = min(max(probability, 1e-6), 1 - 1e-6)
    return float(np.log(p / (1 - p)))


def read_probe(folder: str | Path = SHIPPED) -> Probe:
    """What `write_probe` wrote; the default is for smollm2-135m.

    Raises:
        CheckpointError: missing, damaged or foreign files.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        raw = (folder / WEIGHTS).read_bytes()
        if config.pop("format") != FORMAT or config.pop("sha256") != sha256(raw).hexdigest():
            raise CheckpointError(f"{folder}: {WEIGHTS} is not what {CONFIG} describes: train it again.")  # fmt: skip
        tensors = {name: value.astype(np.float32) for name, value in load(raw).items()}
        weights, centre, spread = (tensors[name] for name in ("weights", "centre", "spread"))
        probe = Probe(weights=weights, centre=centre, spread=spread, **config)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no probe that can be read: {type(error).__name__} {error}."
        ) from None
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise CheckpointError(f"{folder}: weights that are not finite.")
    return probe


def write_probe(folder: Path, probe: Probe) -> None:
    """Write config.json and model.safetensors."""
    named = {name: getattr(probe, name) for name in ("weights", "centre", "spread")}
    raw = save(
        {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in named.items()}
    )
    plain = ("base", "block", "pool", "bias", "slope", "intercept")
    config = {name: getattr(probe, name) for name in plain}
    config |= {"about": dict(probe.about), "format": FORMAT, "sha256": sha256(raw).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    files.write_bytes(folder / WEIGHTS, raw)
    files.write_json(folder / CONFIG, config)
