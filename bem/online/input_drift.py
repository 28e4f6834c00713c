"""Do people ask for something else? A two-sample test on embeddings; reported apart, it decides nothing.

    watch = InputDrift(seed=0)
    for request in stream:
        look = watch.update(embed(request))      # None between two looks
        if look is not None and look.drifted:
            print(look)

Every `recent` requests these are compared with the reference by the maximum mean discrepancy (Gretton et
al. 2012) in random Fourier features (Rahimi & Recht 2007) of a Gaussian kernel, with a permutation test:
exact under exchangeability, whatever the embeddings are like. Blocks of ten neighbours are permuted and
not single requests, since a conversation's turns resemble each other. Each look has the level
sensitivity * recent / (20 windows), so that a false report in that time has chance `sensitivity` at most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from bem.errors import DataError
from bem.online.drift import WINDOWS

BLOCK = 10
FREQUENCIES = 64
PERMUTATIONS = 1000
"""At a time; a look ends as soon as its p-value cannot be below its level."""


@dataclass(frozen=True)
class InputLook:
    """One comparison."""

    event: int
    """Requests so far."""
    distance: float
    """Maximum mean discrepancy, 0 to 2; between equal distributions about sqrt(1/reference + 1/recent)."""
    p_value: float
    """Where the look ended early: of so many permutations as were drawn."""
    drifted: bool


class InputDrift:
    """Reference of embeddings, then a look at every `recent` ones. Seeded; its state is JSON."""

    def __init__(
        self,
        window_size: int = 1000,
        recent: int = 200,
        sensitivity: float = 0.01,
        seed: int = 0,
    ):
        """
        Args:
            window_size, recent: requests in the reference and in a look; whole blocks of 10.
            sensitivity: chance of a false report within 20 windows.
        Raises:
            ValueError: sizes that are no whole blocks, or from which no test of that level can be made.
        """
        if window_size % BLOCK or recent % BLOCK or not 5 * BLOCK <= recent <= window_size:
            raise ValueError(
                f"window_size and recent are whole blocks of {BLOCK}, {5 * BLOCK} <= recent <= window_size; got "
                f"{window_size} and {recent}."
            )
        if not 0 < sensitivity <= 0.5:
            raise ValueError(f"sensitivity is a probability in (0, 0.5], got {sensitivity}.")
        self.window_size, self.recent, self.sensitivity = window_size, recent, sensitivity
        self.seed, self.events, self.bandwidth, self.width = seed, 0, math.nan, 0
        self.level = sensitivity * recent / (WINDOWS * window_size)
        self._raw: list[np.ndarray] = []
        self._reference = np.empty((0, 2 * FREQUENCIES))
        """Mean features of the reference's blocks."""
        self._rng = np.random.Generator(np.random.PCG64(seed))
        ways = math.comb((window_size + recent) // BLOCK, recent // BLOCK)
        if ways * self.level < 1:
            raise ValueError(
                f"{recent} of {window_size + recent} requests can be drawn in {ways} ways, too few for a level of "
                f"{self.level:.2g}: use larger windows."
            )

    def update(self, embedding: Float[np.ndarray, " d"]) -> InputLook | None:
        """Take in one request.

        Raises:
            ValueError: not a vector of finite numbers, or of another length than those before.
        """
        x = np.asarray(embedding, dtype=np.float64)
        self.width = self.width or x.size
        if x.shape != (self.width,) or not np.isfinite(x).all():
            raise ValueError(
                f"embedding {x.shape} must be finite numbers of shape ({self.width},)."
            )
        self._raw.append(x)
        self.events += 1
        if not len(self._reference):
            if len(self._raw) == self.window_size:
                self._settle()
            return None
        if len(self._raw) < self.recent:
            return None
        recent = self._features(np.stack(self._raw))
        self._raw = []
        return self._look(recent)

    def _settle(self) -> None:
        """The median distance between requests is the kernel's width (the usual choice)."""
        x = np.stack(self._raw)
        some = x[:: max(len(x) // 200, 1)]
        squared = np.square(some[:, None] - some[None]).sum(-1)
        apart = squared[squared > 0]
        self.bandwidth = math.sqrt(float(np.median(apart))) if len(apart) else 1.0
        self._reference = self._features(x)
        self._raw = []

    def _features(self, x: np.ndarray) -> np.ndarray:
        """(n, d) -> (n / 10, features): cosines and sines, mean of each block."""
        rng = np.random.Generator(np.random.PCG64([self.seed, 1]))
        angles = x @ rng.normal(0, 1 / self.bandwidth, (x.shape[1], FREQUENCIES))
        features = np.concatenate([np.cos(angles), np.sin(angles)], 1) / math.sqrt(FREQUENCIES)
        return features.reshape(-1, BLOCK, features.shape[1]).mean(1)

    def _look(self, recent: np.ndarray) -> InputLook:
        pool, m = np.concatenate([self._reference, recent]), len(recent)
        total, n = pool.sum(0), len(self._reference)

        def distances(sums: np.ndarray) -> np.ndarray:
            return np.linalg.norm(sums / m - (total - sums) / n, axis=-1)

        found = float(distances(recent.sum(0)))
        drawn = as_far = 0
        most = math.ceil(2 / self.level / PERMUTATIONS) * PERMUTATIONS
        while drawn < most and as_far + 1 <= self.level * (most + 1):
            order = self._rng.random((PERMUTATIONS, len(pool))).argpartition(m, axis=1)[:, :m]
            as_far += int((distances(pool[order].sum(1)) >= found * (1 - 1e-9)).sum())
            drawn += PERMUTATIONS
        p = (as_far + 1) / (drawn + 1)
        return InputLook(self.events, found, p, p <= self.level)

    # --- surviving a restart --------------------------------------------------------------------

    def to_json(self) -> str:
        """Everything, the generator too."""
        return json.dumps(
            {
                "window_size": self.window_size,
                "recent": self.recent,
                "sensitivity": self.sensitivity,
                "seed": self.seed,
                "events": self.events,
                "width": self.width,
                "bandwidth": None if math.isnan(self.bandwidth) else self.bandwidth,
                "raw": [x.tolist() for x in self._raw],
                "reference": self._reference.tolist(),
                "generator": self._rng.bit_generator.state,
            },
            allow_nan=False,
        )

    @staticmethod
    def from_json(text: str) -> InputDrift:
        """The inverse of `to_json`.

        Raises:
            DataError: not such a state.
        """
        try:
            return _restored(json.loads(text))
        except (KeyError, TypeError, ValueError) as failed:
            raise DataError(f"this is no state of an input drift watch: {failed!r}.") from None


def _restored(state: Mapping[str, Any]) -> InputDrift:
    watch = InputDrift(state["window_size"], state["recent"], state["sensitivity"], state["seed"])
    watch.events, watch.width = state["events"], state["width"]
    watch.bandwidth = math.nan if state["bandwidth"] is None else state["bandwidth"]
    watch._raw = [np.array(x, dtype=np.float64) for x in state["raw"]]
    watch._reference = np.array(state["reference"], dtype=np.float64).reshape(-1, 2 * FREQUENCIES)
    watch._rng.bit_generator.state = state["generator"]
    return watch
