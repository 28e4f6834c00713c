"""What clients say of answers: kept before it is acknowledged, so that learning can rest on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from typing import Any, Literal, TypeVar

from pydantic import Field

from bem.engine.request import Result
from bem.errors import DataError, OnlineError, Refused
from bem.files import sha256_json
from bem.online.events import Feedback, Receipt, Served
from bem.serving.answers import Receipt as AnswerReceipt
from bem.serving.answers import choice_id
from bem.serving.prompts import Prepared
from bem.serving.resident import Coin
from bem.serving.schemas import Asked, ChatRequest, CompletionRequest, Message, Part, Text
from bem.serving.tools import has_calls

log = logging.getLogger(__name__)

T = TypeVar("T")


class FeedbackRequest(Part):
    """`POST /v1/feedback`: exactly the field of its kind is given."""

    request: str = Field(min_length=1, max_length=200)
    """Id of the answer, as its receipt says; of a preference, the better one."""
    kind: Literal["score", "correction", "preference", "check"]
    score: float | None = Field(None, ge=0, le=1)
    """score, check: higher is better."""
    text: Text | None = None
    """correction: what the answer should have been."""
    over: str | None = Field(None, min_length=1, max_length=200)
    """preference: id of the worse answer."""
    check: str = Field("", max_length=200)
    """check: its name."""
    id: str | None = Field(None, min_length=1, max_length=200)
    """The same id twice is one event; default: made of what is said."""
    at: str = Field("", max_length=200)
    """The sender's clock."""


class Ledger:
    """Answers and what is said of them, in a database."""

    def __init__(self, where: str):
        """
        Args:
            where: path of an SQLite file, or a URL of SQLAlchemy.
        Raises:
            MissingExtra: SQLAlchemy is not installed.
            OnlineError: it cannot be opened.
        """
        self.log = import_module("bem.online.feedback").FeedbackLog(where)
        self._writes = ThreadPoolExecutor(1, "feedback")

    async def keep(
        self,
        receipt: AnswerReceipt,
        asked: Asked,
        prepared: Prepared,
        results: Sequence[Result],
        owner: str,
        coin: Coin | None,
    ) -> None:
        """Record answers, before they are whole in the client's hands. One that cannot be on record (too long)
        is logged and left out: nothing can be said of it then.

        Raises:
            Refused: 503, the database cannot be written.
        """
        try:
            records = _records(receipt, asked, prepared, results, owner, coin)
            await self._run(lambda: [self.log.record(record) for record in records])
        except DataError as error:
            log.warning("%s is not on record: %s", receipt.id, error)
        except OnlineError as error:
            log.error("%s: %s", receipt.id, error)
            raise Refused(503, "The answer could not be put on record.", retry_after_s=5) from None

    async def add(self, said: FeedbackRequest, owner: str) -> Receipt:
        """Keep what is said; when this returns, it is on disk.

        Raises:
            Refused: no answer of that id was given to this owner, or it makes no sense; 503: the database
                cannot be written, and nothing was acknowledged.
        """
        values = said.model_dump()
        values["id"] = said.id or sha256_json([owner, values])
        try:
            feedback = Feedback(**values, user=owner)
            return await self._run(lambda: self._add(feedback, owner))
        except DataError as error:
            raise Refused(400, str(error), None, "invalid_feedback") from None
        except OnlineError as error:
            log.error("%s", error)
            why = "It could not be kept: send it again."
            raise Refused(503, why, None, "not_kept", retry_after_s=5) from None

    def _add(self, feedback: Feedback, owner: str) -> Receipt:
        for name in filter(None, (feedback.request, feedback.over)):
            served = self.log.request(name)
            if served is None or served.user != owner:
                raise Refused(404, f"No answer {name!r} is on record.", "request", "not_found")
        return self.log.add(feedback)

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writes, call)

    def close(self) -> None:
        """Finish what is being written."""
        self._writes.shutdown()
        self.log.close()


def _records(
    receipt: AnswerReceipt,
    asked: Asked,
    prepared: Prepared,
    results: Sequence[Result],
    owner: str,
    coin: Coin | None,
) -> list[Served]:
    evidence = () if prepared.evidence is None else tuple(prepared.evidence.record.features())
    each = len(results) // len(prepared.prompts)
    return [
        Served(
            choice_id(receipt.id, index, len(results)),
            receipt.version,
            _said(asked, prepared, index // each),
            _text(result.text),
            owner,
            tuple(asdict(action) for action in result.actions),
            evidence,
            candidate=coin is not None and coin.candidate,
            share=None if coin is None else coin.share,
        )
        for index, result in enumerate(results)
        if result.finish_reason != "filtered"  # of what nobody may read nothing is learnt
    ]


def _text(text: str) -> str:
    """Databases keep no NUL."""
    return text.replace("\0", "\ufffd")


def _message(message: Message) -> dict[str, Any]:
    said: dict[str, Any] = {"role": message.role, "content": _text(message.text)}
    if message.tool_calls:
        said["tool_calls"] = [
            {"name": call.function.name, "arguments": _text(call.function.arguments)}
            for call in message.tool_calls
        ]
    return said


def _said(asked: Asked, prepared: Prepared, number: int) -> Any:
    """One prompt, as the client gave it."""
    if isinstance(asked, ChatRequest):
        said = [_message(message) for message in asked.messages]
        if not (prepared.tools or has_calls(asked.messages)):
            return said
        return {"messages": said, "tools": list(prepared.tools.shown) if prepared.tools else []}
    assert isinstance(asked, CompletionRequest)
    prompt = asked.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    one = prompt[number] if several else prompt
    return _text(one) if isinstance(one, str) else one
