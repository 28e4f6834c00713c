"""What a learner teaches: weights that are never those that serve.

A trainee has a shadow, which takes steps, and a stage, on which any version's weights answer. Whatever
it is (`AdapterTrainee`, `RouterTrainee`), the loop sees names, tensors, lessons and scores only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from bem.online.stream import Turn

Weights = Mapping[str, Tensor]
Lesson = Mapping[str, Any]
"""JSON values that a trainee learns from; what it holds is the trainee's own matter."""


@dataclass(frozen=True)
class Answer:
    """What one version did with one request."""

    score: float | None
    """In [0, 1]; None: nothing is known by which to judge it."""
    lesson: Lesson | None
    """What can be learned from it; None: nothing."""
    explored: bool = False
    """Chance chose it, not the version: its score says nothing of the version."""

    @property
    def counts(self) -> bool:
        """Does its score say how good the version is?"""
        return self.score is not None and not self.explored


@dataclass(frozen=True)
class Step:
    """What became of one step of learning."""

    taken: bool
    """False: the shadow is what it was before, bit for bit."""
    loss: float
    length: float
    """Of the step that was left, as a share of the weights' norm."""
    reason: str = ""
    """Why it was discarded."""


class Trainee(Protocol):
    """A shadow and a stage of one kind of weights."""

    kind: str
    """adapter | router"""

    @property
    def born(self) -> Weights:
        """The weights that stand for the bare base, or for what was handed over."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Everything but the weights on which what is learned depends; a resumed run must agree."""
        ...

    def answers(
        self, weights: Weights, turns: Sequence[Turn], draws: np.random.Generator | None
    ) -> list[Answer]:
        """Let a version answer; turns hold no tombstones.

        Args:
            draws: for exploration; None: none, as candidates are judged.
        Raises:
            Whatever the version does: a candidate that raises is rolled back.
        """
        ...

    def turn_of(self, lesson: Lesson, id: str) -> Turn:
        """The request that a lesson came from, with what is known of the right answer."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The shadow's, copied."""
        ...

    def start_from(self, weights: Weights) -> None:
        """Shadow and last accepted version are these; the optimiser forgets what it knew."""
        ...

    def accept(self, weights: Weights, lessons: Sequence[Lesson]) -> None:
        """Penalties hold on to this version from now on; the shadow goes on from where it is.

        Args:
            lessons: on which the Fisher information is taken.
        """
        ...

    def learn(self, lessons: Sequence[Lesson]) -> Step:
        """One bounded step of the shadow. What is not finite, or breaks an invariant, is discarded."""
        ...

    def digest(self, weights: Weights) -> str:
        """Of the `Version` that acts with these weights."""
        ...

    def save(self, weights: Weights, folder: Path) -> None:
        """Write the checkpoint of a version, without anything that a clock says."""
        ...

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Weights of a checkpoint.

        Raises:
            CheckpointError: missing, changed, or of another kind.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Shadow, optimiser, penalties: tensors and plain values, for `write_state`."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, with the same bits."""
        ...
