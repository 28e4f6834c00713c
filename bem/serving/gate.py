"""What every request passes before anything of it is read: who sends it, how large it is, how many there are."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bem.errors import Refused
from bem.serving.generation import error_body
from bem.serving.state import Serving

OPEN = ("/health", "/ready", "/metrics", "/openapi.json", "/dashboard")
"""Addresses that need no key: they say nothing of what was asked."""


class Gate:
    """Lets requests in, and counts them."""

    def __init__(self, app: ASGIApp, serving: Serving):
        self.app, self.serving = app, serving
        self.most = serving.config.max_body_kib * 1024

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        key, counted = None, False
        try:
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            self._check_size(headers.get(b"content-length"))
            key = self.serving.keys.owner(headers.get(b"authorization"))
            limits = self.serving.quotas.begin(key)
            counted = True
            scope.setdefault("state", {})["owner"] = key.name
            await self.app(scope, self._counting(receive), _saying(send, limits))
        except Refused as error:
            if counted:
                raise
            self.serving.metrics.refuse(error.status)
            await refusal_response(error)(scope, receive, send)
        finally:
            if counted and key is not None:
                self.serving.quotas.end(key)

    def _check_size(self, length: str | None) -> None:
        if length is not None and length.isdecimal() and int(length) > self.most:
            raise self._too_large()

    def _too_large(self) -> Refused:
        return Refused(
            413,
            f"The request is larger than the {self.most // 1024} KiB that this server takes.",
            None,
            "request_too_large",
        )

    def _counting(self, receive: Receive) -> Receive:
        """A body that says no length, or a false one, is counted while it comes."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413, str(self._too_large()))
            return message

        return counted


def _saying(send: Send, headers: dict[str, str]) -> Send:
    """Adds headers to the response."""
    added = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def saying(message: Message) -> None:
        if added and message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return saying


def refusal_response(error: Refused) -> JSONResponse:
    """A refusal as OpenAI's protocol says it."""
    headers: dict[str, Any] = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)
