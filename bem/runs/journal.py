"""What is in use in a version store, and how it came to it: the pointer and the ledger, kept in step.

A move goes to the ledger first, then to the pointer. An entry that the pointer never followed (its writer
was killed in between) is marked as abandoned by whoever writes next, so that at most one is ever open.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from bem.errors import CheckpointError
from bem.files import is_draft, locked, sync_folder
from bem.runs.ledger import BEGINNING, Ledger, append, read_ledger, without_torn_line
from bem.runs.pointer import Look, Pointer, look_at, open_moves, read_pointer
from bem.runs.release import Release

FOLDERS = ("objects", "releases")
LOCK = ".lock"


def account() -> str:
    """Whose account this process runs under."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run under a number that nobody has
        return f"uid {os.getuid()}"


def utc_now() -> datetime:
    """The clock of the edge."""
    return datetime.now(UTC)


class Journal:
    """Pointer and ledger of the store in a folder."""

    def __init__(self, path: Path, by: str, clock: Callable[[], datetime]):
        self.path, self.by, self.clock = path, by, clock
        self.pointer_file = path / "current.json"
        self.ledger_file = path / "ledger.jsonl"

    def look(self) -> Look:
        """Pointer and ledger as they are at one instant, whoever writes meanwhile.

        Raises:
            CheckpointError: there is no store here.
        """
        if not self._exists():
            raise CheckpointError(
                f"{self.path} is no version store. `bem promote` makes one; --store names another."
            )
        while True:
            before, ledger = self._pointer(), read_ledger(self.ledger_file)
            if self._pointer() == before:  # nobody moved it while the ledger was read
                break
        pointer, trouble = before
        return (
            look_at(self.pointer_file, pointer, ledger) if pointer else Look(ledger, None, trouble)
        )

    def ledger(self) -> Ledger:
        """The ledger as far as it is whole.

        Raises:
            CheckpointError: there is no store here.
        """
        return self.look().ledger

    def _pointer(self) -> tuple[Pointer | None, str]:
        """The pointer, or what is wrong with it."""
        try:
            return read_pointer(self.pointer_file), ""
        except CheckpointError as damaged:
            return None, str(damaged)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who writes; wait for whoever does. The folder is made if there is none.

        Raises:
            CheckpointError: the folder holds something else, or the disk is full or not writable.
        """
        try:
            held = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
            ours = (*FOLDERS, LOCK, *(n for n in held if is_draft(n, self.pointer_file)))
            if not self._exists() and (foreign := [n for n in held if n not in ours]):
                raise CheckpointError(
                    f"{self.path} is no version store, it holds {foreign[0]!r}: name a new folder by --store."
                )
            with locked(self.path / LOCK):
                if not self._exists():
                    self._make()
                yield
        except OSError as failed:
            raise CheckpointError(
                f"{self.path} could not be written: {failed}. What is in use stays."
            ) from failed

    @contextlib.contextmanager
    def writing(self) -> Iterator[Look]:
        """`locked`, with ledger and pointer in step.

        Raises:
            CheckpointError: one of them is damaged, too.
        """
        with self.locked():
            look = self.look()
            look.ledger.whole()
            yield replace(look, ledger=self._settled(look.ledger, look.agreed()))

    def move(self, ledger: Ledger, event: str, release: Release | None, reason: str) -> None:
        """Put a release, or the bare base, into use."""
        entry = self.note(ledger, event, release, reason).entries[-1]
        version = release.version if release else None
        Pointer(entry.release, version, entry.number, entry.sha256).write(self.pointer_file)

    def note(
        self,
        ledger: Ledger,
        event: str,
        release: Release | None,
        reason: str,
        about: int | None = None,
    ) -> Ledger:
        """Write an entry."""
        return append(
            ledger,
            at=self.clock().astimezone(UTC).isoformat(timespec="milliseconds"),
            by=self.by,
            event=event,
            release=release.id if release else None,
            version=release.version if release else None,
            verdict=release.verdict if release else None,
            reason=reason,
            about=about,
        )

    def begun(self) -> bool:
        """Is something kept here? A store whose maker was killed before the first pointer is none yet."""
        folders = [self.path / name for name in FOLDERS]
        return self._exists() or any(f.is_dir() and any(f.iterdir()) for f in folders)

    def _exists(self) -> bool:
        return self.ledger_file.is_file() or self.pointer_file.is_file()

    def _make(self) -> None:
        """The pointer comes first: from then on one that is missing was lost."""
        if self.begun():
            raise CheckpointError(
                f"{self.path} holds objects and releases, but neither pointer nor ledger. Put them back from a copy, or "
                "name a new folder by --store."
            )
        for name in FOLDERS:
            (self.path / name).mkdir(exist_ok=True)
        sync_folder(self.path.parent)
        Pointer(None, None, 0, BEGINNING).write(self.pointer_file)

    def _settled(self, ledger: Ledger, pointer: Pointer) -> Ledger:
        """Without what a killed writer left open; the ledger says so."""
        if torn := ledger.torn:
            ledger = self.note(
                without_torn_line(ledger), "recover", None, f"a torn line of {len(torn)} bytes was dropped"
            )  # fmt: skip
        for entry in open_moves(pointer, ledger):
            why = f"entry {entry.number} was never completed"
            ledger = self.note(ledger, "abandon", None, why, entry.number)
        return ledger
