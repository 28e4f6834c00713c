"""From a picture and what is said of it to the numbers that a controller or router is told.

    p_j          probability that claim j is true of the picture: Poisson-binomial of the patches' support
    coverage     mean over the phrases that the text says are there of max_i s_ij
    explained    share of the salient patches that one of these phrases accounts for
    consistency  mean_j p_j
    gate         0: no picture, a blank one, one unlike all that the tower knows or with nothing of it on it, a claim with p_j < `conflict`, or an
                 error; else min_j p_j, or 1 where nothing is claimed

All features are multiplied by the gate: where it is 0 they are all zero, which is what "there is no picture" is, and
what acts is that of the text alone, to the bit. A question or a request claims nothing and is not judged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bem.config import CONCEPTS, VISION_FEATURES
from bem.errors import ConfigError
from bem.vision.claims import Claim, claims_in
from bem.vision.scenes import Picture
from bem.vision.tower import Features, VisionTower

LOG = logging.getLogger(__name__)
GRID = 256
"""Steps per unit of a feature: the same picture gives the same names of chunks on every machine."""
SEEN = 0.5
"""Support from which a phrase accounts for a patch."""
MOST_COUNTED = 16


@dataclass(frozen=True)
class Judged:
    """A claim, and how probable it is that it is true of the picture; None: the tower does not know the words."""

    text: str
    probability: float | None


@dataclass(frozen=True)
class VisionRecord:
    """What was seen, and how far it is to be heeded."""

    gate: float
    why: str
    """Why the gate is 0; "": it is not."""
    encoder_id: str
    claims: tuple[Judged, ...] = ()
    coverage: float = 0.0
    explained: float = 0.0
    consistency: float = 0.0
    certainty: float = 1.0
    """The least probable claim's probability."""
    things: int = 0
    """Salient patches."""
    strangeness: float = 0.0
    """See `Features`."""
    concepts: tuple[float, ...] = ()
    """Greatest support of each of the tower's concepts."""

    @property
    def conflict(self) -> float:
        """1 - probability of the least probable claim."""
        return 1 - self.certainty

    def features(self) -> tuple[float, ...]:
        """What an adapter is told, in the order of `bem.config.VISION_FEATURES`, each in [0, 1]; all 0 at gate 0."""
        if not self.gate:
            return (0.0,) * len(VISION_FEATURES)
        judged = sum(claim.probability is not None for claim in self.claims)
        told = [
            1.0,
            self.coverage,
            self.explained,
            self.consistency,
            self.certainty,
            min(1.0, judged / 4),
            min(1.0, self.things / MOST_COUNTED),
            max(0.0, 1 - self.strangeness),
            *self.concepts,
        ]
        told += [0.0] * (len(VISION_FEATURES) - len(told))
        return tuple(round(self.gate * value * GRID) / GRID for value in told)


class Eyes:
    """Looks at pictures through a tower."""

    def __init__(self, tower: VisionTower, conflict: float = 0.1):
        """
        Args:
            conflict: a claim that is less probable contradicts the picture.
        Raises:
            ConfigError: not in [0, 1), or a tower with more than 16 concepts.
        """
        if not 0 <= conflict < 1:
            raise ConfigError(f"conflict must be in [0, 1), got {conflict}.")
        if len(tower.concepts) > CONCEPTS:
            raise ConfigError(
                f"a tower has {CONCEPTS} concepts at most, got {len(tower.concepts)}."
            )
        self.tower, self.conflict = tower, conflict

    @property
    def encoder_id(self) -> str:
        """Of the tower; what a router was fitted to."""
        return self.tower.encoder_id

    def look(self, picture: Picture | None, text: str = "") -> VisionRecord:
        """What is to be told of a picture beside which a text stands; see the module's docstring."""
        return self.look_at([picture], [text])[0]

    def look_at(
        self, pictures: Sequence[Picture | None], texts: Sequence[str]
    ) -> list[VisionRecord]:
        """The same of several, each by itself; None: there is no picture."""
        return [
            self._none("no picture") if picture is None else self._looked(picture, text)
            for picture, text in zip(pictures, texts, strict=True)
        ]

    def _looked(self, picture: Picture, text: str) -> VisionRecord:
        try:
            return self._judged(picture, claims_in(text))
        except (
            Exception
        ) as error:  # whatever a tower dies of: the answer is then that of the text alone
            LOG.exception("the vision tower %s failed", self.encoder_id)
            return self._none(f"error: {type(error).__name__} {error}"[:300])

    def _none(self, why: str) -> VisionRecord:
        return VisionRecord(0.0, why, self.encoder_id)

    def _judged(self, picture: Picture, claims: Sequence[Claim]) -> VisionRecord:
        seen = self.tower.encode([picture])
        named = list(dict.fromkeys(phrase for claim in claims for phrase in claim.phrases))
        phrases = [*self.tower.concepts, *named]
        support = self.tower.support(seen, phrases)[0] if phrases else seen.patches.new_zeros(1, 0)
        of = {phrase: support[:, at] for at, phrase in enumerate(phrases)}
        judged = tuple(Judged(c.text, probability(c, of, seen.grid)) for c in claims)
        known = [j.probability for j in judged if j.probability is not None]
        certainty = min(known, default=1.0)
        strange, things = float(seen.strangeness[0]), int(seen.salient[0].sum())
        asserted = [p for c in claims if c.positive for p in c.phrases if _is_known(of[p])]
        why = self._why(seen, strange, certainty, judged)
        concepts = tuple(float(of[c].max()) for c in self.tower.concepts)
        if not all(map(math.isfinite, (strange, certainty, *concepts))):
            return self._none("error: the tower's numbers are not finite")
        return VisionRecord(
            0.0 if why else max(certainty, 1 / GRID), why, seen.encoder_id, judged,
            _mean([float(of[p].max()) for p in asserted]),
            _explained(seen, [of[p] for p in asserted]),
            _mean(known), certainty, things, strange, concepts,
        )  # fmt: skip

    def _why(
        self, seen: Features, strange: float, certainty: float, judged: Sequence[Judged]
    ) -> str:
        """Why the picture is not to be heeded; "": it is."""
        if bool(seen.blank[0]):
            return "blank"
        if not strange <= 1:  # also true for NaN
            return (
                f"unlike all that {self.encoder_id} knows ({strange:.1f} times as far as its limit)"
            )
        if not bool(seen.salient.any()):
            return f"nothing that {self.encoder_id} knows is on it"
        if certainty < self.conflict:
            said = next(j for j in judged if j.probability == certainty)
            return f"conflict: {said.text!r} is {certainty:.2f} probable"
        return ""


def probability(claim: Claim, of: dict[str, Tensor], grid: tuple[int, int]) -> float | None:
    """That a claim is true, given the support of each phrase (patches,); None: an unknown phrase."""
    support = [of[phrase].double() for phrase in claim.phrases]
    if not all(map(_is_known, support)):
        return None
    if claim.relation:
        return _related(claim.relation, support[0], support[1], grid)
    return count_probability(support[0], claim.least, claim.most)


def count_probability(support: Tensor, least: int, most: int) -> float:
    """P(least <= number of things <= most), each patch holding one with its own probability, independently."""
    seen = support[support > 1e-4].clamp(max=1).tolist()
    top = min(len(seen), least if most >= len(seen) else most)
    chances = torch.zeros(top + 2, dtype=torch.float64)
    chances[0] = 1.0  # the last cell takes all larger numbers
    for p in seen:
        moved = chances * p
        chances = chances * (1 - p)
        chances[1:] += moved[:-1]
        chances[-1] += moved[-1]
    kept = chances[least:] if most >= len(seen) else chances[least : most + 1]
    return min(1.0, max(0.0, float(kept.sum())))


def _related(relation: str, one: Tensor, other: Tensor, grid: tuple[int, int]) -> float:
    """Of the pair of patches that shows the relation best."""
    places = torch.arange(len(one))
    along = places % grid[1] if "of" in relation else places // grid[1]
    before = along[:, None] < along[None]
    right = before if relation in ("left of", "above") else before.T
    return float((one[:, None] * other[None] * right).max())


def _explained(seen: Features, supports: Sequence[Tensor]) -> float:
    salient = seen.salient[0]
    if not supports or not salient.any():
        return 0.0
    named = torch.stack(list(supports)).amax(0) >= SEEN
    return float(named[salient].float().mean())


def _is_known(support: Tensor) -> bool:
    return not bool(support.isnan().any())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
