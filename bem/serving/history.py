"""The last minutes of a server, for the dashboard: what was done in each few seconds, and the last answers.

Nothing of what was said is kept, only how long it was and who spoke.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bem.engine.engine import StepStats
from bem.engine.request import ChunkAction, Result
from bem.runs.release import SHORT

SECONDS = 5.0
"""Of one entry."""
ENTRIES = 120
ANSWERS = 12
MOST = 512
"""Times to the first token that are kept of one entry."""


@dataclass
class Entry:
    """What was done in some seconds."""

    at: float
    """When they began."""
    generated: int = 0
    prefilled: int = 0
    reused: int = 0
    running: int = 0
    waiting: int = 0
    """The most that ran, and waited."""
    answers: int = 0
    first_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=MOST))
    experts: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)


class History:
    """Told of steps by one thread, asked by another."""

    def __init__(self, clock: Callable[[], float]):
        """clock: seconds that only grow."""
        self.clock = clock
        self._entries: deque[Entry] = deque(maxlen=ENTRIES)
        self._answers: deque[dict[str, Any]] = deque(maxlen=ANSWERS)
        self._lock = threading.Lock()

    def step(self, stats: StepStats) -> None:
        """One step of an engine."""
        with self._lock:
            entry = self._now()
            entry.generated += stats.decoded
            entry.prefilled += stats.prefilled
            entry.reused += stats.reused
            entry.running = max(entry.running, stats.running)
            entry.waiting = max(entry.waiting, stats.waiting)
            for result in stats.finished:
                self._answered(entry, result)

    def _now(self) -> Entry:
        start = self.clock() // SECONDS * SECONDS
        if not self._entries or self._entries[-1].at != start:
            self._entries.append(Entry(start))
        return self._entries[-1]

    def _answered(self, entry: Entry, result: Result) -> None:
        entry.answers += 1
        entry.versions[result.version[:SHORT] or "-"] += 1
        entry.experts.update(action.expert for action in result.actions)
        if result.first_token_s is not None:
            entry.first_token_s.append(result.first_token_s)
        total = result.prompt_tokens + len(result.token_ids)
        self._answers.append(
            {
                "version": result.version[:SHORT],
                "prompt_tokens": result.prompt_tokens,
                "cached_tokens": result.cached_tokens,
                "tokens": len(result.token_ids),
                "seconds": round(result.seconds, 3),
                "finish_reason": result.finish_reason,
                "route": _route(result.actions, total),
            }
        )

    def shown(self) -> dict[str, Any]:
        """Everything, as plain JSON; ages are in seconds before now."""
        with self._lock:
            now = self.clock()
            entries = [_shown(entry, now) for entry in self._entries]
            return {"seconds": SECONDS, "entries": entries, "answers": list(self._answers)[::-1]}


def _shown(entry: Entry, now: float) -> dict[str, Any]:
    times = sorted(entry.first_token_s)
    return {
        "age": round(now - entry.at, 1),
        "generated": entry.generated,
        "prefilled": entry.prefilled,
        "reused": entry.reused,
        "running": entry.running,
        "waiting": entry.waiting,
        "answers": entry.answers,
        "first_p50_ms": _quantile_ms(times, 0.5),
        "first_p95_ms": _quantile_ms(times, 0.95),
        "experts": dict(entry.experts),
        "versions": dict(entry.versions),
    }


def _quantile_ms(times: Sequence[float], share: float) -> float | None:
    return round(1000 * times[min(int(share * len(times)), len(times) - 1)], 1) if times else None


def _route(actions: Sequence[ChunkAction], total: int) -> list[dict[str, Any]]:
    """Who spoke, from which token on, for how many."""
    stops = [*(action.start for action in actions[1:]), total]
    return [
        {"expert": action.expert, "start": action.start, "tokens": stop - action.start}
        for action, stop in zip(actions, stops, strict=False)  # no action: no stop either
    ]
