"""How strongly a model is guarded: kappa, from the operator's floor to 1.

An operator moves its level, downwards only so fast. A request may ask for more while it runs, never for less.
Every move is noted. One kappa per thread: what a request raises holds in its own `with` block alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from bem.errors import SafetyError

REMEMBERED = 1000


@dataclass(frozen=True)
class Move:
    """One change of the level, or one request's wish."""

    at: float
    """In seconds of the knob's clock."""
    before: float
    asked: float
    after: float
    who: str
    why: str


class Knob:
    """Kappa, with its floor, its slew limit and its notes."""

    def __init__(
        self,
        level: float = 0.0,
        floor: float = 0.0,
        slew: float = 0.01,
        clock: Callable[[], float] = time.time,
    ):
        """
        Args:
            level: where it starts, from `floor` to 1.
            floor: below it nobody gets; 0 lets an operator switch the guard's clamp off.
            slew: largest fall of the level per second since its last move.
            clock: in seconds.
        Raises:
            SafetyError: numbers outside [0, 1], or a level below the floor.
        """
        if not (0 <= floor <= level <= 1 and slew >= 0):
            raise SafetyError(
                f"a knob needs 0 <= floor <= level <= 1 and slew >= 0, got {floor}, {level} and {slew}."
            )
        self.floor, self.slew, self._clock = floor, slew, clock
        self._level, self._moved, self._lock = level, clock(), threading.Lock()
        self._asked = threading.local()
        self.audit: deque[Move] = deque(maxlen=REMEMBERED)

    @property
    def level(self) -> float:
        """The operator's."""
        return self._level

    def move(self, to: float, who: str, why: str) -> float:
        """Move the level; up at once, down by at most slew * seconds since the last move.

        Returns:
            Where it is now.
        Raises:
            SafetyError: below the floor, above 1 or not a number.
        """
        if not self.floor <= to <= 1:
            raise SafetyError(
                f"kappa {to} must lie in [{self.floor}, 1]: the operator's floor is fixed when the guard is made."
            )
        with self._lock:
            now, before = self._clock(), self._level
            self._level = max(to, before - self.slew * max(0.0, now - self._moved))
            self._moved = now
            self.audit.append(Move(now, before, to, self._level, who, why))
            return self._level

    @contextlib.contextmanager
    def raised(self, to: float | Tensor, who: str = "request", why: str = "") -> Iterator[None]:
        """At least `to` for whatever runs in this thread inside; less than the level changes nothing.

        Args:
            to: a number in [0, 1], or one for each row of the batch (rows,).
        Raises:
            SafetyError: outside [0, 1] or not a number.
        """
        lowest, highest = (float(to.min()), float(to.max())) if isinstance(to, Tensor) else (to, to)
        if not 0 <= lowest <= highest <= 1:
            raise SafetyError(
                f"kappa must lie in [0, 1], a request asked for {lowest} to {highest}."
            )
        self.note(highest, who, why)
        with self.holding(to):
            yield

    def note(self, asked: float, who: str, why: str) -> None:
        """A request wants so much, whoever makes it hold."""
        level = self._level
        self.audit.append(Move(self._clock(), level, asked, max(level, asked), who, why))

    @contextlib.contextmanager
    def holding(self, to: float | Tensor) -> Iterator[None]:
        """As `raised`, without checks and notes: for who runs many requests in one pass, step by step."""
        before = getattr(self._asked, "kappa", None)
        self._asked.kappa = to if before is None else _larger(before, to)
        try:
            yield
        finally:
            self._asked.kappa = before

    def now(self) -> float | Tensor:
        """What holds in this thread."""
        asked = getattr(self._asked, "kappa", None)
        return self._level if asked is None else _larger(asked, self._level)


def _larger(one: float | Tensor, other: float | Tensor) -> float | Tensor:
    if isinstance(one, Tensor):
        return one.maximum(other if isinstance(other, Tensor) else one.new_tensor(other))
    return other.clamp(min=one) if isinstance(other, Tensor) else max(one, other)
