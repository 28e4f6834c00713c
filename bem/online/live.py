"""Learning beside what serves: the loop on a feedback log that grows."""

from __future__ import annotations

from bem.online.feedback import FeedbackLog
from bem.online.loop import Loop
from bem.online.stream import turn_of


def catch_up(loop: Loop, log: FeedbackLog, most: int | None = None) -> int:
    """Take in what the log holds and the loop has not seen, round by round; how many events that were.

    Every request is answered once more, by the version in use and by whatever is on trial: that is how
    versions are compared that have not served it. A round that is not full waits for more events.
    The place in the log is part of the loop's snapshot: after a kill nothing is taken in twice.

    Args:
        loop: opened.
        most: events at most; None: all.
    """
    taken, size = 0, loop.config.round_size
    while most is None or taken + size <= most:
        events = log.read(after=loop.sequence, limit=size)
        # a tombstone does not wait: whoever asks to be forgotten is forgotten now
        if not events or (len(events) < size and not any(e.erase for e in events)):
            break
        turns = [turn for event in events if (turn := turn_of(event)) is not None]
        loop.round(turns, upto=events[-1].sequence)
        taken += len(events)
    return taken
