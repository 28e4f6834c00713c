"""What a guard did, line by line on disk, before it is done; without the texts, unless they are asked for."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bem.errors import DataError, SafetyError
from bem.safety.guard import Ruling


class AuditLog:
    """JSON Lines that only grow; several servers may share one file."""

    def __init__(
        self,
        path: Path | None,
        keep_text: bool = False,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        """
        Args:
            path: None: nothing is kept.
            keep_text: write the texts too.
        """
        self.path, self.keep_text, self._clock = path, keep_text, clock
        self._lock = threading.Lock()

    def note(self, id: str, key: str, place: str, text: str, ruling: Ruling) -> None:
        """Keep a ruling; when this returns, it is on disk.

        Raises:
            SafetyError: it cannot be written.
        """
        if self.path is None:
            return
        line: dict[str, Any] = {
            "at": self._clock().isoformat(timespec="milliseconds"),
            "id": id,
            "key": key,
            "place": place,
            "action": ruling.action,
            "kappa": ruling.kappa,
            "characters": len(text),
            "met": [vars(m) for m in ruling.met],
        }
        if self.keep_text:
            line["text"] = text
        with self._lock:
            _append(self.path, json.dumps(line, ensure_ascii=True).encode() + b"\n")


def _append(path: Path, line: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":  # torn when a server was killed
                line = b"\n" + line
            if os.write(handle, line) != len(line):
                raise OSError("the line was written in part: is the disk full?")
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise SafetyError(f"{path} cannot be written: {error}. Nothing goes on unaudited.") from None  # fmt: skip


def counted(path: Path) -> tuple[Counter[tuple[str, str, str]], int]:
    """((place, category, action) -> how often, lines that are torn) of an audit log.

    Raises:
        DataError: it cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    found: Counter[tuple[str, str, str]] = Counter()
    torn = 0
    for line in filter(None, lines):
        try:
            said = json.loads(line)
            for met in said["met"]:
                found[said["place"], met["category"], met["action"]] += 1
        except (ValueError, KeyError, TypeError):
            torn += 1
    return found, torn
