"""A version in memory, and what holds it there while an answer runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bem.engine.engine import Engine
from bem.runs.release import SHORT, Release


@dataclass(frozen=True)
class Coin:
    """How a canary's coin fell for a request."""

    candidate: bool
    share: float
    """The chance of the candidate."""


@dataclass(eq=False)
class Resident:
    """One version in memory."""

    version: str
    """Digest of what acts."""
    release: Release | None
    """None: the bare base."""
    adapted: Any
    """The release on a copy of the base; the copy itself for the bare base."""
    engine: Engine
    host: str
    """The engine's name: the version for which it was made."""
    experts: tuple[str, ...] = ()
    acting: str = ""
    """The same as the engine calls it: under a guard, another name than that of the release."""
    users: int = 0
    """Requests that are being answered by it."""
    used: int = field(default=0)
    """When it was last asked for, counted in requests."""

    def __post_init__(self) -> None:
        self.acting = self.acting or self.version

    @property
    def guest(self) -> bool:
        """Does it share the engine of another version, and with it every pass?"""
        return self.host != self.version

    @property
    def short(self) -> str:
        """Its version, as people are shown it."""
        return self.version[:SHORT]


class Lease:
    """A version that answers one request, until its answer is out."""

    def __init__(
        self, resident: Resident, let_go: Callable[[Resident], None], coin: Coin | None = None
    ):
        """
        Args:
            let_go: called once, at the end.
            coin: how the canary's fell; None: none was tossed.
        """
        self.resident, self._let_go, self.coin = resident, let_go, coin
        self._held = True

    def end(self) -> None:
        """The answer is out; said twice it counts once."""
        if self._held:
            self._held = False
            self._let_go(self.resident)
