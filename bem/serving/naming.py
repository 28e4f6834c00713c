"""Names of models: `bem`, `bem:base`, `bem:EXPERT`, `bem@VERSION`, `bem@VERSION:EXPERT`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bem.errors import Refused

BASE = "base"
_FORM = re.compile(r"bem(?:@(?P<version>[0-9a-f]{4,64}))?(?::(?P<expert>.+))?")


@dataclass(frozen=True)
class Name:
    """What a model's name asks for."""

    version: str | None = None
    """Digits that its digest begins with; None: what is in use."""
    expert: str | None = None
    """None: whatever the router chooses."""

    @property
    def bare(self) -> bool:
        """Is it the base with nothing on it?"""
        return self.version is None and self.expert == BASE


def parse_name(name: str) -> Name:
    """The name of a model.

    Raises:
        Refused: 404, no such form.
    """
    found = _FORM.fullmatch(name)
    if found is None:
        raise unknown_model(
            name, "Names are bem, bem:base, bem:EXPERT and bem@VERSION; see GET /v1/models."
        )
    return Name(found["version"], found["expert"])


def unknown_model(name: str, why: str) -> Refused:
    """The refusal of a model that is not there."""
    return Refused(
        404, f"The model {name!r:.300} does not exist. {why}", "model", "model_not_found"
    )
