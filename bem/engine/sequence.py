"""A request that is being answered."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Row
from dataclasses import dataclass, field

import torch

from bem.engine.acts import Acts
from bem.engine.grammar import Matcher
from bem.engine.request import FinishReason, Request, TokenLogprob
from bem.engine.store import Block


class Spans:
    """Where the chunks of a sequence begin: at its first token, at every turn, every `size` tokens after either."""

    def __init__(self, prompt: int, turns: Row[int], size: int):
        """turns: positions in the prompt; its last token starts one in any case."""
        self.size, self.turns = size, {*turns, prompt - 1}
        self.starts = [0]
        for turn in [*sorted(self.turns - {0}), None]:
            stop = prompt if turn is None else turn
            while self.starts[-1] + size < stop:
                self.starts.append(self.starts[-1] + size)
            if turn is not None:
                self.starts.append(turn)

    def grow(self, length: int) -> None:
        """The sequence has so many tokens now."""
        while self.starts[-1] + self.size < length:
            self.starts.append(self.starts[-1] + self.size)

    def finished(self, read: int) -> int:
        """Chunks that can grow no more once so many tokens were read."""
        known = [*self.starts[1:], self.starts[-1] + self.size]
        return sum(stop <= read for stop in known)

    def span(self, chunk: int) -> tuple[int, int]:
        """(first token, the one behind the last) of a finished chunk, by number from 0."""
        start = self.starts[chunk]
        stop = self.starts[chunk + 1] if chunk + 1 < len(self.starts) else start + self.size
        return start, stop

    def filled(self, read: int) -> int:
        """Tokens in the running chunk; before the first token it counts as full."""
        if not read:
            return self.size
        return read - self.starts[bisect_left(self.starts, read) - 1]


@dataclass(eq=False)
class Sequence:
    """Its tokens, its place, and how far it is."""

    id: int
    request: Request
    ids: list[int]
    """Prompt and answer."""
    prompt: int
    """Tokens of the prompt."""
    submitted: float
    """By the engine's clock, in seconds."""
    sample: int = 0
    """Which of the answers that the request wants."""
    first: Sequence | None = None
    """Answer 0 of the request, for the others: it scores the prompt for all."""
    acts: Acts | None = None
    route: int | None = None
    slot: int = -1
    """Of the slab."""
    control: int = -1
    """Slot of the control state."""
    spans: Spans | None = None
    read: int = 0
    """Tokens whose keys and values are in the slab."""
    cached: int = 0
    """Of these: taken from the store."""
    blocks: list[Block] = field(default_factory=list)
    """Its chunks that were found or put in the store, from the first on: it runs on them, purged or not."""
    chain: list[tuple[str, str]] = field(default_factory=list)
    """Of each chunk whose tokens are known: names of its text and of the decisions up to it; see `chain`."""
    storing: bool = True
    """Its chunks still find room in the store."""
    looked_up: bool = False
    """The store was asked for its prompt, and what it has is in place."""
    generator: torch.Generator | None = None
    matcher: Matcher | None = None
    """Where the answer stands in its grammar."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str | None = None
    """Cut before a stop string; None: decode the tokens."""
    ended_by_token: bool = False
    """The last token ended the answer and is no part of it."""
    first_token: float | None = None
    finished: FinishReason | None = None
    error: str = ""

    @property
    def answer(self) -> list[int]:
        """Tokens generated so far, the one that ended the answer left out."""
        answer = self.ids[self.prompt :]
        return answer[:-1] if self.ended_by_token else answer

    @property
    def prefilling(self) -> bool:
        """Is some of the prompt still to be read?"""
        return self.read < self.prompt

    @property
    def scores(self) -> bool:
        """Must log-probabilities of the prompt be computed for it?"""
        return self.request.prompt_logprobs is not None and self.first is None

    @property
    def waits(self) -> bool:
        """Is the prompt still being scored for it?"""
        first = self.first
        wanted = first is not None and first.scores
        return wanted and first.prefilling and first.finished is None

    @property
    def most(self) -> int:
        """Tokens that it can hold in the end."""
        return self.prompt + self.request.max_new_tokens

    @property
    def deadline(self) -> float | None:
        """By the engine's clock."""
        timeout = self.request.timeout_s
        return None if timeout is None else self.submitted + timeout
