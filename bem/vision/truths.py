"""Claims that are made of a scene, and whether they are true of it: by its things, not by its picture."""

from __future__ import annotations

import numpy as np

from bem.vision.claims import MANY, Claim, singular
from bem.vision.scenes import BOX, GAP, NAMES, SHAPES, Scene, Thing

KINDS = ("present", "absent", "count", "at least", "relation")


def is_true(claim: Claim, scene: Scene) -> bool:
    """Whether a claim about colours and shapes holds."""
    if not claim.relation:
        return claim.least <= len(_named(claim.phrase, scene)) <= claim.most
    along = 0 if "of" in claim.relation else 1
    forward = claim.relation in ("left of", "above")
    pairs = (
        (one[along], other[along])
        for one in _named(claim.phrase, scene)
        for other in _named(claim.other, scene)
    )
    return any(a < b if forward else a > b for a, b in pairs)


def _named(phrase: str, scene: Scene) -> list[tuple[float, float]]:
    """Centres of the things that a phrase names."""
    words = set(phrase.split())
    found = []
    for number, things in enumerate(scene):
        for thing in things:
            if words <= {thing.colour, thing.shape, "thing"}:
                left = number * (BOX + GAP)
                found.append((left + thing.x + thing.size / 2, thing.y + thing.size / 2))
    return found


def drawn_claim(scene: Scene, kind: str, rng: np.random.Generator) -> Claim:
    """A claim of a kind, true or false of the scene: about half are true where the scene allows both."""
    things = [thing for box in scene for thing in box]
    phrase = _phrase(things, rng)
    if kind == "relation":
        other = _phrase(things, rng)
        how = ("left of", "right of", "above", "below")[rng.integers(4)]
        return Claim(f"a {phrase} is {how} a {other}", phrase, relation=how, other=other)
    count = sum(set(phrase.split()) <= {t.colour, t.shape, "thing"} for t in things)
    if kind == "present":
        return Claim(f"there is a {phrase}", phrase)
    if kind == "absent":
        return Claim(f"there is no {phrase}", phrase, 0, 0)
    n = max(1, count + int(rng.integers(2)) * int(rng.choice([-1, 1])))
    if kind == "at least":
        n = max(1, count + int(rng.integers(2)))
        return Claim(f"there are at least {n} {phrase}s", phrase, n, MANY)
    return Claim(f"there are exactly {n} {phrase}s", phrase, n, n)


def _phrase(things: list[Thing], rng: np.random.Generator) -> str:
    """Of something that is there, or of anything."""
    one = things[rng.integers(len(things))] if things and rng.random() < 0.5 else None
    colour = one.colour if one else NAMES[rng.integers(len(NAMES))]
    shape = one.shape if one else SHAPES[rng.integers(len(SHAPES))]
    words = ([colour, shape], [colour, "thing"], [shape])[int(rng.choice(3, p=[0.7, 0.15, 0.15]))]
    return singular(" ".join(words))
