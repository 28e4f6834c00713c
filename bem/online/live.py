"""Learning beside what serves: the loop on a feedback log that grows."""

from __future__ import annotations

import threading
from collections.abc import Callable

from bem.errors import DataError
from bem.online.events import Event
from bem.online.feedback import FeedbackLog
from bem.online.loop import Loop, Round
from bem.online.stream import Turn, turn_of
from bem.training.example import Example

Check = Callable[[Example], object]
"""Raises DataError where a row cannot be learned from."""


def catch_up(
    loop: Loop,
    log: FeedbackLog,
    most: int | None = None,
    check: Check | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> int:
    """Take in what the log holds and the loop has not seen, round by round; how many events that were.

    Every request is answered once more, by the version in use and by whatever is on trial: that is how
    versions are compared that have not served it. A round that is not full waits for more events.
    The place in the log is part of the loop's snapshot: after a kill nothing is taken in twice. An event
    that cannot be used (a prompt of token ids, an answer that is too long) is noted and passed over.

    Args:
        loop: opened.
        most: events at most; None: all.
        check: of every row; None: all can be learned from.
    """
    taken, size = 0, loop.config.round_size
    while most is None or taken + size <= most:
        events = log.read(after=loop.sequence, limit=size)
        # a tombstone does not wait: whoever asks to be forgotten is forgotten now
        if not events or (len(events) < size and not any(e.erase for e in events)):
            break
        turns = [turn for event in events if (turn := _usable(loop, event, check)) is not None]
        done = loop.round(turns, upto=events[-1].sequence)
        taken += len(events)
        if on_round is not None:
            on_round(done)
    return taken


def _usable(loop: Loop, event: Event, check: Check | None) -> Turn | None:
    """What clients send is not always something that a model can be taught: that stops nobody else."""
    try:
        turn = turn_of(event)
        if turn is not None and turn.row is not None and check is not None:
            check(turn.row)
    except DataError as failed:
        loop.desk.note(loop.event, "passed over", sequence=event.sequence, reason=str(failed))
        return None
    return turn


def follow(
    loop: Loop,
    log: FeedbackLog,
    stopped: threading.Event,
    wait_s: float,
    check: Check | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> None:
    """`catch_up` until it is stopped, which is looked at between two rounds.

    Args:
        wait_s: seconds between looks at the log while nothing is said.
    """
    loop.desk.show(loop.status())
    while not stopped.is_set():
        if catch_up(loop, log, loop.config.round_size, check, on_round):
            loop.desk.show(loop.status())
        else:
            stopped.wait(wait_s)
