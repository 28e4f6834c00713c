"""Tokens to text while they come: what was sent is never taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character yet."""


class Detokenizer:
    """The text of one answer, piece by piece.

    All pieces together are the answer's text: half a character waits for its other half, and what may be the
    beginning of a stop string waits until it is one or none.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.text = ""
        """Decoded so far."""
        self._ids: list[int] = []
        self._begin = self._read = 0  # a token's text may depend on the one before it
        self._sent = 0

    def push(self, ids: Sequence[int]) -> str:
        """The next tokens; returns what of the text can be sent now."""
        for token in ids:
            self._ids.append(token)
            known = self._decode(self._ids[self._begin : self._read])
            whole = self._decode(self._ids[self._begin :])
            if len(whole) > len(known) and not whole.endswith(HALF):
                self.text += whole[len(known) :]
                self._begin, self._read = self._read, len(self._ids)
        return self._until(len(self.text) - self._held())

    def finish(self, text: str) -> str:
        """The answer is over and this is all of its text: the rest of it."""
        self.text = text
        return self._until(len(text))

    def _until(self, stop: int) -> str:
        piece, self._sent = self.text[self._sent : stop], max(self._sent, stop)
        return piece

    def _held(self) -> int:
        """Characters at the end that may begin a stop string."""
        return max((overlap(self.text, stop) for stop in self.stops), default=0)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    longest = min(len(text), len(stop))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
