"""Where a fall happened: every slice's mean since the fall began, against its own reference."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scipy.special import ndtr

from bem.online.reference import Reference

MOST_SLICES = 256


@dataclass(frozen=True)
class SliceFall:
    """One slice since the fall began."""

    name: str
    n: int
    """Scores since then."""
    fall: float | None
    """By how much its mean is lower than in the reference, in the scores' units; None: the slice
    was not in the reference."""
    p_value: float | None
    """One-sided, times the number of slices (Bonferroni)."""


class SliceMeans:
    """Counts and sums per slice: in the reference, and since the chart last stood at 0."""

    def __init__(self) -> None:
        self.reference: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        self.since: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])

    def check(self, names: Iterable[str | None]) -> None:
        """Raise before anything is taken in, if there are too many slices to mean something."""
        known = {*self.reference, *self.since, *names} - {None}
        if len(known) > MOST_SLICES:
            raise ValueError(
                f"got {len(known)} slices, {MOST_SLICES} at most: a slice is a skill, a domain or a language, "
                "not a user or a request. Hand over coarser names."
            )

    def learn(self, names: Iterable[str | None], scores: Iterable[float]) -> None:
        """Of the reference."""
        _add(self.reference, names, scores)

    def add(self, names: Iterable[str | None], scores: Iterable[float]) -> None:
        """After the reference."""
        _add(self.since, names, scores)

    def begin(self) -> None:
        """The chart stands at 0: what falls, falls from here on."""
        self.since.clear()

    def falls(self, reference: Reference) -> tuple[SliceFall, ...]:
        """Every slice seen since then; the surest fall first, slices without a reference last."""
        found = [self._fall(name, reference) for name in self.since]
        order = {f.name: (f.p_value is None, f.p_value or 0.0, -(f.fall or 0.0)) for f in found}
        return tuple(sorted(found, key=lambda f: order[f.name]))

    def _fall(self, name: str, reference: Reference) -> SliceFall:
        n, total = self.since[name]
        if name not in self.reference:
            return SliceFall(name, int(n), None, None)
        before, sum_before = self.reference[name]
        fall = sum_before / before - total / n
        error = reference.sd * math.sqrt(reference.inflation * (1 / n + 1 / before))
        p = min(float(ndtr(-fall / error)) * len(self.since), 1.0)
        return SliceFall(name, int(n), fall, p)

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return {
            which: {name: list(pair) for name, pair in means.items()}
            for which, means in (("reference", self.reference), ("since", self.since))
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        for mine, kept in ((self.reference, "reference"), (self.since, "since")):
            mine.clear()
            mine.update({name: list(pair) for name, pair in state[kept].items()})


def _add(
    means: dict[str, list[float]], names: Iterable[str | None], scores: Iterable[float]
) -> None:
    for name, score in zip(names, scores, strict=True):
        if name is None:
            continue
        entry = means[name]
        entry[0] += 1
        entry[1] += score
