"""What an adapter is told about a picture."""

from __future__ import annotations

CONCEPTS = 16
"""Phrases by which a tower describes a picture of which nothing is said, at most."""
VISION_FEATURES = (
    "gate",
    "coverage",
    "explained",
    "consistency",
    "certainty",
    "claims",
    "things",
    "familiarity",
    *(f"concept_{number}" for number in range(1, CONCEPTS + 1)),
)
"""What an adapter is told, each in [0, 1] and times the gate; all zero: no picture, or one that is not to be heeded."""
