"""The ledger of a version store: who put what into use, when, and by which verdict.

One JSON object a line, only ever appended. Each holds the sha256 of the one before it, so that a line
that is changed, dropped or moved shows. The last line may be torn: the process was killed, or the disk
was full, while it was written; it was then never acknowledged.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bem.errors import CheckpointError
from bem.files import sha256_json, sync_folder

BEGINNING = "0" * 64
"""What the first entry names as the one before it."""
MOVES = ("promote", "rollback", "repair")
"""Events that move the pointer: a release, or the bare base, is in use from then on."""


@dataclass(frozen=True)
class Entry:
    """One line."""

    number: int
    """From 1."""
    at: str
    """UTC, ISO 8601."""
    by: str
    event: str
    """One of MOVES; import and collect; abandon (a move that was never completed) and recover (a torn line)."""
    release: str | None
    """Id of the release; None: the bare base, or it is about none."""
    version: str | None
    """Digest of what acts, see `bem.adapters.version.Version`."""
    verdict: str | None
    """sha256 of the verdicts that it rests on."""
    reason: str
    about: int | None
    """Number of the entry that an abandon is about."""
    previous: str
    """sha256 of the entry before it."""

    @property
    def sha256(self) -> str:
        """Of everything above."""
        return sha256_json(asdict(self))

    def line(self) -> bytes:
        """As it stands in the file, with its sha256."""
        values = {**asdict(self), "sha256": self.sha256}
        return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


@dataclass(frozen=True)
class Ledger:
    """What a ledger's file holds."""

    path: Path
    entries: tuple[Entry, ...] = ()
    """Every entry before the first that is damaged."""
    torn: bytes = b""
    """A last line that has no end."""
    damage: str = ""
    """What is wrong behind `entries`; empty: nothing."""

    @property
    def head(self) -> str:
        """sha256 of the newest entry."""
        return self.entries[-1].sha256 if self.entries else BEGINNING

    def moves(self) -> list[Entry]:
        """Entries that put something into use, oldest first, without those that were abandoned."""
        abandoned = {entry.about for entry in self.entries if entry.event == "abandon"}
        return [e for e in self.entries if e.event in MOVES and e.number not in abandoned]

    def whole(self) -> Ledger:
        """Itself.

        Raises:
            CheckpointError: it is damaged.
        """
        if self.damage:
            raise CheckpointError(
                f"{self.path} is damaged: {self.damage}. What is in use goes on; put the file back from a copy, or run "
                "`bem store repair`, which keeps it beside a ledger of what is whole."
            )
        return self


def read_ledger(path: Path) -> Ledger:
    """A ledger's entries, as far as each rests on the one before it; none if there is no file."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raw = b""
    except OSError as failed:
        return Ledger(path, damage=f"it cannot be read ({failed.strerror})")
    *lines, torn = raw.split(b"\n")
    entries: list[Entry] = []
    previous = BEGINNING
    for number, line in enumerate(lines, 1):
        entry = _parsed(line)
        if entry is None:
            damage = f"line {number} was changed after it was written"
            return Ledger(path, tuple(entries), damage=damage)
        if (entry.number, entry.previous) != (number, previous):
            damage = f"line {number} does not follow on the one before it: lines were dropped, added or moved"
            return Ledger(path, tuple(entries), damage=damage)
        entries.append(entry)
        previous = entry.sha256
    return Ledger(path, tuple(entries), torn)


def _parsed(line: bytes) -> Entry | None:
    """The entry of a line that is byte for byte what `Entry.line` writes."""
    try:
        values = json.loads(line)
        entry = Entry(**{field.name: values[field.name] for field in fields(Entry)})
        return entry if entry.line() == line + b"\n" else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def append(ledger: Ledger, **values: object) -> Ledger:
    """Write one entry behind the last and sync it; the ledger with it.

    Args:
        ledger: as it is on disk, whole and without a torn line: the caller holds the store's lock.
        values: of the entry, but for its number and the one before it.
    Raises:
        OSError: the disk is full or not writable; the file is as it was.
    """
    entry = Entry(number=len(ledger.entries) + 1, previous=ledger.head, **values)  # type: ignore[arg-type]
    is_new = not ledger.path.exists()
    with open(ledger.path, "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            line = entry.line()
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise
    if is_new:
        sync_folder(ledger.path.parent)
    return Ledger(ledger.path, (*ledger.entries, entry))


def without_torn_line(ledger: Ledger) -> Ledger:
    """Cut a torn last line off the file: it was never acknowledged."""
    if not ledger.torn:
        return ledger
    with open(ledger.path, "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - len(ledger.torn))
        os.fsync(file.fileno())
    return Ledger(ledger.path, ledger.entries)


def in_use(moves: list[Entry]) -> list[str | None]:
    """What was put into use and not taken back, oldest first: the last is in use, the one before it is
    where a rollback goes. It begins with None, the bare base.

    A promotion comes on top; a rollback to something below takes away what stands above it: that was bad.
    """
    stack: list[str | None] = [None]
    for entry in moves:
        if entry.release in stack:
            del stack[stack.index(entry.release) + 1 :]
        else:
            stack.append(entry.release)
    return stack
