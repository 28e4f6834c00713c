"""A sentence-encoder router, as semantic routers are: the embedding of what the user said last, and the
nearest centroid of the experts' training turns by cosine.

It reads a turn's own text alone: neither the turns before it nor what was answered. So it cannot know what a
turn without a cue asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from bem.evidence.encoders import Encoder, load_encoder
from bem.experiments.routing.skills import Options
from bem.experiments.routing.stages import RoutingArtifacts
from bem.training.data import Example


@dataclass(frozen=True)
class Nearest:
    """The centroid of each class, and which class it is of."""

    centroids: Float[np.ndarray, "classes dimension"]  # of norm 1
    classes: Int[np.ndarray, " classes"]

    def __call__(self, vectors: Float[np.ndarray, "texts dimension"]) -> Int[np.ndarray, " texts"]:
        """Class whose centroid has the largest cosine to each vector; the first of equal ones."""
        return self.classes[(vectors @ self.centroids.T).argmax(1)]


def fit_nearest(
    vectors: Float[np.ndarray, "texts dimension"], labels: Int[np.ndarray, " texts"]
) -> Nearest:
    """Means of the classes' unit vectors, scaled to norm 1. A class without a text is never chosen.

    Args:
        vectors: of norm 1.
    """
    classes = np.unique(labels)
    means = np.stack([vectors[labels == each].mean(0) for each in classes])
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    return Nearest(means / np.maximum(norms, 1e-12), classes)


def said(row: Example) -> list[str]:
    """What the user says in each turn of a row, its last one included."""
    return [*(user for user, _ in row.history), row.prompt]


def encoder_route(artifacts: RoutingArtifacts, rows: Sequence[Example]) -> tuple[Options, dict]:
    """Expert option of each turn by `routing.encoder`, fitted on the turns of the labelled rows.

    Raises:
        MissingExtra: the encoder's library is not installed; names the line that does it.
        BaseError: the encoder cannot be fetched; names the line that fetches it.
        DataError: there is no such encoder.
    """
    name, train = artifacts.routing.encoder, artifacts.labelled_rows()
    encoder = load_encoder(name, artifacts.inputs.device)
    vector_of = _vectors(encoder, [*train, *rows], artifacts)
    gold = np.concatenate([artifacts.skills.route(row) for row in train])
    seen = np.stack([vector_of[text] for row in train for text in said(row)])
    nearest = fit_nearest(seen, gold)
    options = [nearest(np.stack([vector_of[t] for t in said(row)])).tolist() for row in rows]
    right = [
        a == b
        for row, chosen in zip(rows, options, strict=True)
        for a, b in zip(chosen, artifacts.skills.route(row), strict=True)
    ]
    facts = {"accuracy_per_turn": float(np.mean(right)), "trained_on": len(gold), "encoder": name}
    return options, facts


def _vectors(
    encoder: Encoder, rows: Sequence[Example], artifacts: RoutingArtifacts
) -> dict[str, np.ndarray]:
    """Text -> vector; one row is a turn of many conversations and is read once."""
    texts = list(dict.fromkeys(text for row in rows for text in said(row)))
    tell = lambda done, of: artifacts.say("encoding turns", done, of, encoder.name)  # noqa: E731
    return dict(zip(texts, encoder.encode(texts, tell), strict=True))
