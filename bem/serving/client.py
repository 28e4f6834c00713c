"""Talks to a server of ours, with nothing but the standard library."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from bem.errors import Refused, Unreachable


@dataclass(frozen=True)
class Client:
    """A server's address, and the key for it."""

    url: str
    """Without /v1."""
    key: str | None = None
    timeout_s: float = 600.0

    def get(self, path: str) -> Any:
        """What stands at a path."""
        with self._answer(path, None) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """What is answered to a body."""
        with self._answer(path, body) as response:
            return json.load(response)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The pieces of a streamed answer, as they come.

        Raises:
            Refused: the server turned it away, or failed in the middle.
            Unreachable: nobody answers, or no longer.
        """
        with self._answer(path, {**body, "stream": True}) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data == "[DONE]":
                    return
                if data:
                    piece = json.loads(data)
                    if "error" in piece:
                        raise _refused(500, piece, {})
                    yield piece
            raise Unreachable(f"{self.url} broke its answer off.")

    @contextmanager
    def _answer(self, path: str, body: dict[str, Any] | None) -> Iterator[Any]:
        with self._open(path, body) as response:
            try:
                yield response
            except (HTTPException, OSError, json.JSONDecodeError) as error:
                raise Unreachable(f"{self.url} broke its answer off ({error!r}).") from error

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url.rstrip("/") + path, data, headers)
            return urllib.request.urlopen(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            raise _refused(error.code, _json_of(error.read()), error.headers) from None
        except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            raise Unreachable(
                f"{self.url} does not answer ({why}): does `bem serve` run there?"
            ) from None


def _json_of(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


def _refused(status: int, body: Any, headers: Any) -> Refused:
    after = headers.get("retry-after") or ""
    wait = int(after) if after.isdecimal() else None
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return Refused(status, f"The server answered with status {status}.", retry_after_s=wait)
    said = str(error.get("message")), error.get("param"), error.get("code")
    return Refused(status, *said, retry_after_s=wait)
