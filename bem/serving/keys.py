"""API keys: who may ask, and how much. Only their sha256 is kept; a key is shown once, when it is made.

A key is 256 random bits, so that a plain hash of it cannot be turned back; a password could.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from pathlib import Path

from pydantic import Field

from bem.config.section import Section, parse
from bem.errors import BemError, ConfigError, Refused
from bem.files import locked, read_json, write_json

log = logging.getLogger(__name__)

FORMAT = 1
PREFIX = "bem-"


class Key(Section):
    """One key, without the key."""

    name: str = Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")
    """On whose behalf; their chunks are found by nobody else."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: str
    requests_per_minute: int | None = Field(None, ge=1)
    """None: as many as the server answers."""
    concurrent: int | None = Field(None, ge=1)
    """Requests at once; None: as many as the server answers."""


class KeyFile(Section):
    """All keys of a server."""

    format: int = FORMAT
    keys: tuple[Key, ...] = ()


def read_keys(path: Path) -> KeyFile:
    """The keys in a file.

    Raises:
        ConfigError: no such file, or no file of keys.
    """
    if not path.is_file():
        raise ConfigError(
            f"There is no file of keys {path}: `bem keys add NAME --keys {path}` makes one."
        )
    found = parse(KeyFile, read_json(path, ConfigError), str(path))
    if found.format != FORMAT:
        raise ConfigError(f"{path} has format {found.format}, this version reads {FORMAT}.")
    return found


def add_key(
    path: Path, name: str, requests_per_minute: int | None = None, concurrent: int | None = None
) -> str:
    """Make a key and write it to a file, which is made if there is none; returns the key itself.

    Raises:
        ConfigError: there is a key of that name, or it cannot be a name.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    values = {
        "name": name,
        "sha256": _digest(secret),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "requests_per_minute": requests_per_minute,
        "concurrent": concurrent,
    }
    made = parse(Key, values, "bem keys add")
    with locked(path.with_name(path.name + ".lock")):
        known = read_keys(path).keys if path.is_file() else ()
        if any(key.name == name for key in known):
            raise ConfigError(f"{path} has a key {name!r} already: remove it first.")
        _write(path, (*known, made))
    return secret


def remove_key(path: Path, name: str) -> None:
    """Take a key away; a server that runs notices at the next request.

    Raises:
        ConfigError: there is none of that name.
    """
    with locked(path.with_name(path.name + ".lock")):
        known = read_keys(path).keys
        left = tuple(key for key in known if key.name != name)
        if len(left) == len(known):
            names = ", ".join(key.name for key in known) or "none"
            raise ConfigError(f"{path} has no key {name!r}. It has: {names}.")
        _write(path, left)


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    write_json(path, KeyFile(keys=keys).model_dump(mode="json"))
    os.chmod(path, 0o600)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


ANYBODY = parse(Key, {"name": "-", "sha256": "0" * 64, "created": ""}, "keys")
"""Who asks where there are no keys."""


class KeyRing:
    """The keys of a server that runs: a file that is read again when it changes."""

    def __init__(self, path: Path | None):
        """path: None: no key is needed.

        Raises:
            ConfigError: no file of keys.
        """
        self.path = path
        self._seen = None if path is None else _mark(path)
        self._keys = () if path is None else read_keys(path).keys

    @property
    def names(self) -> list[str]:
        """Of the keys that are known now."""
        return [key.name for key in self._keys]

    def owner(self, header: str | None) -> Key:
        """Who sent an `Authorization` header.

        Raises:
            Refused: 401, nobody that is known.
        """
        if self.path is None:
            return ANYBODY
        self._look(self.path)
        kind, _, secret = (header or "").partition(" ")
        given, found = _digest(secret.strip()), None
        for key in self._keys:  # all of them: how long it takes says nothing
            if hmac.compare_digest(key.sha256, given):
                found = key
        if found is None or kind.lower() != "bearer":
            raise Refused(
                401,
                "A key of this server is needed: send `Authorization: Bearer KEY`.",
                None,
                "invalid_api_key",
            )
        return found

    def _look(self, path: Path) -> None:
        if (mark := _mark(path)) == self._seen:
            return
        self._seen = mark
        try:
            self._keys = read_keys(path).keys
        except BemError as error:
            log.error("the keys cannot be read again, those from before hold: %s", error)


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@dataclass
class _Use:
    """What an owner has used."""

    left: float
    """Requests that may come now."""
    at: float
    running: int = 0


class Quotas:
    """Requests of each owner, by the minute (a bucket that fills evenly) and at once."""

    def __init__(self, clock: Callable[[], float]):
        """clock: seconds that only grow."""
        self.clock = clock
        self._used: dict[str, _Use] = {}

    def begin(self, key: Key) -> dict[str, str]:
        """One more request; returns what its response says of the limits.

        Raises:
            Refused: 429, one too many; says when to come again.
        """
        now = self.clock()
        most = key.requests_per_minute or 0
        use = self._used.setdefault(key.name, _Use(float(most), now))
        if key.concurrent is not None and use.running >= key.concurrent:
            raise self._refused(f"{key.name} has {use.running} requests running", 1)
        if most:
            use.left = min(float(most), use.left + (now - use.at) * most / 60)
            use.at = now
            if use.left < 1:
                wait = ceil((1 - use.left) * 60 / most)
                raise self._refused(f"{key.name} may send {most} requests a minute", wait)
            use.left -= 1
        use.running += 1
        if not most:
            return {}
        return {
            "x-ratelimit-limit-requests": str(most),
            "x-ratelimit-remaining-requests": str(int(use.left)),
        }

    def end(self, key: Key) -> None:
        """A request is over."""
        self._used[key.name].running -= 1

    def _refused(self, why: str, wait: int) -> Refused:
        return Refused(
            429,
            f"{why}: try again in {wait} s.",
            None,
            "rate_limit_exceeded",
            retry_after_s=wait,
        )
