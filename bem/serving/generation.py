"""A client's request on its way through the engine: waited for, streamed, given up when nobody listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from bem.engine.request import Request, Result
from bem.errors import EngineError, MissingExtra, QueueFull, Refused
from bem.serving.answers import Face, Receipt, about, finished, usage
from bem.serving.detokenizer import Detokenizer
from bem.serving.driver import Driver, Event, Job, Progress
from bem.serving.prompts import Prepared
from bem.serving.tools import Call, CallReader, said_calls

DONE = "data: [DONE]\n\n"


class Answers(Protocol):
    """Where the choices of one request come from; see `Answering`."""

    def give_up(self) -> None: ...

    async def next(self) -> tuple[int, Progress | Result]: ...

    async def results(self) -> list[Result]: ...

    def readers(self, tokenizer: Any) -> list[Any]:
        """What turns the tokens of each choice into text, as `Detokenizer` does."""
        ...


class Answering:
    """All choices of one request, as the engine gives them."""

    def __init__(self, driver: Driver, engine: str, requests: Sequence[Request], streams: bool):
        """Submits them; the event loop that runs hears of them."""
        loop = asyncio.get_running_loop()
        self.driver = driver
        self.queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.jobs = [
            Job(engine, request, streams, loop, self._ear(index))
            for index, request in enumerate(requests)
        ]
        for job in self.jobs:
            driver.submit(job)

    def _ear(self, index: int) -> Callable[[Event], None]:
        return lambda event: self.queue.put_nowait((index, event))

    def give_up(self) -> None:
        """Nobody waits any more: what still runs is cancelled."""
        for job in self.jobs:
            if not job.over:
                job.over = True
                self.driver.cancel(job)

    async def next(self) -> tuple[int, Progress | Result]:
        """(choice, what came of it).

        Raises:
            Refused: the queue is full, or the request can never be served.
            EngineError: the engine failed.
        """
        index, event = await self.queue.get()
        if isinstance(event, BaseException):
            raise refusal_of(event)
        if isinstance(event, Result) and not event.version:
            raise Refused(
                503,
                f"The request waited {event.seconds:.1f} s and was never begun: the server is busy.",
                None,
                "timeout",
                retry_after_s=5,
            )
        if isinstance(event, Result) and event.error:
            raise Refused(400, event.error, None, "no_answer_fits")
        return index, event

    def readers(self, tokenizer: Any) -> list[Any]:
        """A detokenizer for each choice."""
        return [Detokenizer(tokenizer, job.request.stop) for job in self.jobs]

    async def results(self) -> list[Result]:
        """All of them, in order."""
        found: dict[int, Result] = {}
        while len(found) < len(self.jobs):
            index, event = await self.next()
            if isinstance(event, Result):
                found[index] = event
        return [found[index] for index in range(len(self.jobs))]


class Decided:
    """Choices that need no engine: a request that is refused."""

    def __init__(self, decided: Sequence[Result]):
        self.left, self.decided = list(enumerate(decided)), list(decided)

    def give_up(self) -> None:
        """Nothing runs."""

    async def next(self) -> tuple[int, Progress | Result]:
        """(choice, its end)."""
        return self.left.pop(0)

    async def results(self) -> list[Result]:
        """All of them."""
        return self.decided

    def readers(self, tokenizer: Any) -> list[Any]:
        """A detokenizer for each choice."""
        return [Detokenizer(tokenizer) for _ in self.decided]


def refusal_of(error: BaseException) -> BaseException:
    """What a client is told of an engine's error."""
    if isinstance(error, QueueFull):
        return Refused(429, f"Too many requests: {error}", None, "queue_full", retry_after_s=1)
    if isinstance(error, MissingExtra):
        return Refused(501, str(error), None, "not_installed")
    if isinstance(error, EngineError):
        return Refused(400, str(error), None, "invalid_request")
    return error


@dataclass
class _Choice:
    """One answer that is being streamed."""

    detokenizer: Any
    """As `Answers.readers` gives it."""
    reader: CallReader | None = None
    """Looks for calls of tools, where there are any."""
    tokens: int = 0
    characters: int = 0
    begun: bool = False
    result: Result | None = None
    held: list[Any] = field(default_factory=list)
    """Log-probabilities of tokens whose text was not sent yet."""


class Stream:
    """Server-sent events of one request."""

    def __init__(
        self,
        answering: Answers,
        face: Face,
        receipt: Receipt,
        prepared: Prepared,
        with_usage: bool,
        keep: Callable[[list[Result]], Awaitable[None]],
    ):
        """keep: called with all answers before the last event is sent."""
        self.answering, self.face, self.receipt = answering, face, receipt
        self.prepared, self.with_usage, self.keep = prepared, with_usage, keep
        tools = prepared.tools
        self.choices = [
            _Choice(reader, tools and CallReader(tools))
            for reader in answering.readers(face.tokenizer)
        ]

    async def events(self, first: tuple[int, Progress | Result]) -> AsyncIterator[str]:
        """All of them; first: what was waited for before the headers went out."""
        try:
            news = first
            while True:
                piece = self._piece(*news)
                if self._over:
                    await self.keep(self.results)
                if piece is not None:
                    yield _event(self.face.piece(self.receipt, [piece], **self._beside()))
                if self._over:
                    break
                news = await self.answering.next()
            if self.with_usage:
                said = {"usage": usage(self.results, len(self.prepared.prompts))}
                yield _event(self.face.piece(self.receipt, [], **said))
            yield DONE
        except Exception as error:  # the status is sent: the stream itself must say it
            yield _event(error_body(error))
        finally:
            self.answering.give_up()

    def _piece(self, index: int, news: Progress | Result) -> dict[str, Any] | None:
        choice = self.choices[index]
        new = slice(choice.tokens, None) if isinstance(news, Result) else slice(None)
        ids = news.token_ids[new]
        choice.held += news.logprobs[new]
        choice.tokens += len(ids)
        text, calls = self._said(choice, news, ids)
        said = text or calls or (isinstance(news, Progress) and news.actions)
        if choice.begun and choice.result is None and not said:
            return None
        piece = self.face.delta(index, text, choice.held, not choice.begun, choice.characters)
        if calls and choice.reader is not None:
            first = choice.reader.calls - len(calls)
            piece["delta"]["tool_calls"] = said_calls(calls, first)
        if isinstance(news, Progress) and news.actions:
            piece["bem"] = {"actions": [asdict(action) for action in news.actions]}
        choice.held, choice.begun = [], True
        choice.characters += len(text)
        if not isinstance(news, Result):
            return piece
        called = choice.reader is not None and choice.reader.calls > 0
        return {**self.face.ended(piece, news), "finish_reason": finished(news, called)}

    def _said(
        self, choice: _Choice, news: Progress | Result, ids: Sequence[int]
    ) -> tuple[str, list[Call]]:
        """(text, calls of tools) that can be sent now."""
        if isinstance(news, Result):
            choice.result = news
            text = choice.detokenizer.finish(news.text)  # which may end before its last tokens do
        else:
            text = choice.detokenizer.push(ids)
        return choice.reader.push(text, choice.result is not None) if choice.reader else (text, [])

    @property
    def results(self) -> list[Result]:
        """Of the choices that are over."""
        return [choice.result for choice in self.choices if choice.result]

    @property
    def _over(self) -> bool:
        return len(self.results) == len(self.choices)

    def _beside(self) -> dict[str, Any]:
        """What a piece says of the whole request; the last one, what only this server says."""
        said: dict[str, Any] = {"usage": None} if self.with_usage else {}
        if self._over:
            said["bem"] = about(self.receipt, self.results, self.prepared)
        return said


def error_body(error: BaseException) -> dict[str, Any]:
    """An error as OpenAI's protocol says it."""
    if not isinstance(error, Refused):
        message = "The server failed; its log says why."
        return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(
        error.status, "invalid_request_error" if error.status < 500 else "server_error"
    )
    return {
        "error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    }


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
