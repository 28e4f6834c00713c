"""From what the engine gave to what OpenAI's protocol says, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bem.engine.request import ChunkAction, FinishReason, Result, TokenLogprob
from bem.runs.release import SHORT
from bem.serving.pictures import about_picture
from bem.serving.prompts import Prepared
from bem.serving.tools import CallReader, Tools, said_calls

LEAST = -9999.0
"""Stands for a log-probability of minus infinity, which JSON does not have."""
FINISHED: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "deadline": "length",  # OpenAI's protocol knows no deadline; `bem` says that it was one
    "cancelled": "length",
    "error": "length",  # refused before it comes to this
    "filtered": "content_filter",
}
Ids = Sequence[int]


@dataclass(frozen=True)
class Receipt:
    """By whom and when an answer was given: what feedback refers to."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    """As the client named it."""
    version: str
    """Digest of what acted."""
    kappa: float | None = None
    """To which a guard or the request raised the safety knob."""

    def headers(self, cached_tokens: int) -> dict[str, str]:
        """Of the response."""
        return {
            "x-request-id": self.id,
            "x-bem-version": self.version,
            "x-bem-cached-tokens": str(cached_tokens),
        }


def choice_id(request: str, index: int, choices: int) -> str:
    """By which feedback refers to one of several answers; the only one has the request's own id."""
    return request if choices == 1 else f"{request}.{index}"


class Face:
    """How one of OpenAI's endpoints says things. Subclasses say what differs."""

    prefix = whole_object = piece_object = ""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def whole(
        self, receipt: Receipt, results: Sequence[Result], prepared: Prepared
    ) -> dict[str, Any]:
        """The answer to a request."""
        echoed = prepared.echoed
        shown = echoed or [None] * len(results)
        choices = [
            self.choice(i, result, ids)
            for i, (result, ids) in enumerate(zip(results, shown, strict=True))
        ]
        if prepared.tools is not None:
            for choice, result in zip(choices, results, strict=True):
                _read_calls(choice, result, prepared.tools)
        return {
            **self._head(receipt, self.whole_object),
            "choices": choices,
            "usage": usage(results, len(prepared.prompts)),
            "bem": about(receipt, results, prepared),
        }

    def piece(self, receipt: Receipt, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A piece of a streamed answer."""
        return {**self._head(receipt, self.piece_object), "choices": choices, **more}

    def _head(self, receipt: Receipt, kind: str) -> dict[str, Any]:
        return {
            "id": receipt.id,
            "object": kind,
            "created": receipt.created,
            "model": receipt.model,
            "system_fingerprint": receipt.version[:SHORT],
        }

    def choice(self, index: int, result: Result, echoed: Ids | None) -> dict[str, Any]:
        """One whole answer; echoed: the prompt, if it is to stand before it."""
        raise NotImplementedError

    def delta(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], first: bool, offset: int
    ) -> dict[str, Any]:
        """A piece of an answer; offset: characters of the answer before it."""
        raise NotImplementedError

    def ended(self, piece: dict[str, Any], result: Result) -> dict[str, Any]:
        """A piece with which an answer ends."""
        reason = FINISHED[result.finish_reason]
        if result.finish_reason == "filtered":
            self.refuse(piece, result.error)
        return {**piece, "finish_reason": reason, "bem": about_choice(result)}

    def refuse(self, piece: dict[str, Any], say: str) -> None:
        """Say in a piece, or in a whole answer, that it was taken away."""
        raise NotImplementedError

    def text_of(self, token: int) -> str:
        """A token as text."""
        return self.tokenizer.decode([token])


class CompletionFace(Face):
    """`/v1/completions`."""

    prefix, whole_object, piece_object = "cmpl-", "text_completion", "text_completion"

    def choice(self, index: int, result: Result, echoed: Ids | None) -> dict[str, Any]:
        if echoed is None:
            piece = self.delta(index, result.text, result.logprobs, True, 0)
            return self.ended(piece, result)
        before = self.tokenizer.decode(list(echoed))
        piece = self.delta(index, before + result.text, (), True, 0)
        if result.prompt_logprobs or len(echoed) == 1:
            piece["logprobs"] = self._echoed(echoed, result)
        return self.ended(piece, result)

    def refuse(self, piece: dict[str, Any], say: str) -> None:
        piece["text"] = piece["text"] or say  # this protocol has no other place for it

    def _echoed(self, echoed: Ids, result: Result) -> dict[str, Any]:
        """Of prompt and answer; nothing precedes the first token, so that it has none."""
        said = self._logprobs([*result.prompt_logprobs, *result.logprobs], 0)
        first = self.text_of(echoed[0])
        return {
            "tokens": [first, *said["tokens"]],
            "token_logprobs": [None, *said["token_logprobs"]],
            "top_logprobs": said["top_logprobs"] and [None, *said["top_logprobs"]],
            "text_offset": [0, *(len(first) + offset for offset in said["text_offset"])],
        }

    def delta(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], first: bool, offset: int
    ) -> dict[str, Any]:
        said = self._logprobs(logprobs, offset) if logprobs else None
        return {"index": index, "text": text, "logprobs": said, "finish_reason": None}

    def _logprobs(self, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        tokens = [self.text_of(each.token_id) for each in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        tops: list[dict[str, float]] = []
        for each in logprobs:
            top: dict[str, float] = {}
            for token, value in each.top:  # the likeliest first: it keeps its text
                top.setdefault(self.text_of(token), _number(value))
            tops.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": [_number(each.logprob) for each in logprobs],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": offsets,
        }


class ChatFace(Face):
    """`/v1/chat/completions`."""

    prefix = "chatcmpl-"
    whole_object, piece_object = "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, result: Result, echoed: Ids | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": result.text, "refusal": None}
        said = {"index": index, "message": message, "logprobs": self._logprobs(result.logprobs)}
        return self.ended(said, result)

    def delta(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], first: bool, offset: int
    ) -> dict[str, Any]:
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        said = self._logprobs(logprobs)
        return {"index": index, "delta": delta, "logprobs": said, "finish_reason": None}

    def refuse(self, piece: dict[str, Any], say: str) -> None:
        message = piece["message"] if "message" in piece else piece["delta"]
        message["refusal"], message["content"] = say, message["content"] or None

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        content = [
            {
                **self._token(each.token_id, each.logprob),
                "top_logprobs": [self._token(token, value) for token, value in each.top],
            }
            for each in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text_of(token)
        return {"token": text, "logprob": _number(logprob), "bytes": list(text.encode())}


def _read_calls(choice: dict[str, Any], result: Result, tools: Tools) -> None:
    """Put the calls in a whole answer where OpenAI's protocol has them."""
    text, calls = CallReader(tools).push(result.text, last=True)
    if calls:
        choice["message"] |= {"content": text or None, "tool_calls": said_calls(calls)}
        choice["finish_reason"] = finished(result, called=True)


def finished(result: Result, called: bool) -> str:
    """Why an answer ended, as OpenAI's protocol says it; called: it holds calls of tools."""
    reason = FINISHED[result.finish_reason]
    return "tool_calls" if called and reason == "stop" else reason


def usage(results: Sequence[Result], prompts: int) -> dict[str, Any]:
    """Tokens of a request: each prompt counts once, however many answers it has."""
    n = len(results) // prompts
    read = sum(result.prompt_tokens for result in results[::n])
    cached = sum(result.cached_tokens for result in results[::n])
    written = sum(len(result.token_ids) for result in results)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def about(receipt: Receipt, results: Sequence[Result], prepared: Prepared) -> dict[str, Any]:
    """What only this server says of an answer."""
    cached = sum(result.cached_tokens for result in results)
    said: dict[str, Any] = {"version": receipt.version, "cached_tokens": cached}
    if receipt.kappa is not None:
        said["kappa"] = receipt.kappa
    if (evidence := prepared.evidence) is not None:
        said["evidence"] = {
            "passages": [{"id": p.id, "text": p.shown} for p in evidence.passages],
            "features": list(evidence.record.features()),
            "timed_out": evidence.record.timed_out,
        }
    if prepared.vision is not None:
        said["vision"] = about_picture(prepared.vision)
    return said


def about_choice(result: Result) -> dict[str, Any]:
    """What only this server says of one choice."""
    actions: tuple[ChunkAction, ...] = result.actions
    return {
        "actions": [asdict(action) for action in actions],
        "cached_tokens": result.cached_tokens,
        "finish_reason": result.finish_reason,
    }


def _number(value: float) -> float:
    return max(value, LEAST)
