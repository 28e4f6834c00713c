"""Who is served next: a bounded queue, in turn between keys, and a budget of prompt tokens for each step."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from collections.abc import Sequence as Row

from bem.engine.runner import Piece
from bem.engine.sequence import Sequence
from bem.errors import QueueFull

PADDED = 1.25
"""Most tokens that a pass over prompts may compute for each real one."""


class Waiting:
    """Requests that were not begun: first come, first served within a key, and the keys in turn."""

    def __init__(self, most: int):
        self.most = most
        self._by_key: OrderedDict[str, deque[Sequence]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._by_key.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self._by_key.values() for sequence in queue)

    def has_room(self, n: int) -> bool:
        """For so many more?"""
        return len(self) + n <= self.most

    def add(self, *sequences: Sequence) -> None:
        """Take a request in, with all its answers.

        Raises:
            QueueFull: as many as allowed wait already.
        """
        if not self.has_room(len(sequences)):
            raise QueueFull(
                f"{len(self)} requests wait, the queue holds {self.most}: step the engine, try again later, or make "
                "the queue longer."
            )
        self._by_key.setdefault(sequences[0].request.key, deque()).extend(sequences)

    def take(self) -> Sequence | None:
        """The next one; its key goes to the end of the line."""
        if not self._by_key:
            return None
        key, queue = self._by_key.popitem(last=False)
        sequence = queue.popleft()
        if queue:
            self._by_key[key] = queue
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """It is not to be served any more."""
        key = sequence.request.key
        self._by_key[key].remove(sequence)
        if not self._by_key[key]:
            del self._by_key[key]


def prefill_pieces(sequences: Row[Sequence], budget: int) -> list[Piece]:
    """What of the prompts is read in one step: in the order of arrival, at most `budget` tokens."""
    pieces = []
    for sequence in sequences:
        tokens = min(budget, sequence.prompt - sequence.read)
        if tokens <= 0:
            break
        pieces.append(Piece(sequence, tokens))
        budget -= tokens
    return pieces


def batches(pieces: Row[Piece]) -> list[list[Piece]]:
    """Pieces that are alike in length share a pass: little of it is padding."""
    made: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda p: -p.tokens):
        if made:
            batch = [*made[-1], piece]
            real = sum(p.tokens for p in batch)
            if batch[0].tokens * len(batch) <= PADDED * real:
                made[-1] = batch
                continue
        made.append([piece])
    return made
