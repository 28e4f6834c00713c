"""Work that may take until a deadline, and not longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def before(deadline: float | None, work: Callable[[], T | None]) -> T | None:
    """Result of `work`, or None as soon as the deadline has passed; its errors are raised here.

    With a deadline it runs in a thread of its own, which is left behind when time is up: so `work`
    should look at `passed(deadline)` now and then, and return None.

    Args:
        deadline: in seconds of `time.monotonic()`; None: as long as it takes, in this thread.
    """
    if deadline is None:
        return work()
    done: list[T | None] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:
            failed.append(error)

    # Not a daemon: one that is inside torch when the interpreter ends aborts the process.
    worker = threading.Thread(target=run, name="rerank", daemon=False)
    worker.start()
    worker.join(max(0.0, deadline - time.monotonic()))
    if failed:
        raise failed[0]
    return done[0] if done else None


def passed(deadline: float | None) -> bool:
    """Whether the deadline lies behind us."""
    return deadline is not None and time.monotonic() >= deadline
