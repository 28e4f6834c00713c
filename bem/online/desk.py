"""The learner's folder: one writer, snapshots that are whole, a journal, and what is shown to people.

FOLDER/
  .lock, epoch.json     who writes; the epoch rises with every writer, and an older one is refused
  snapshots/N.pt        everything after N rounds, with its sha256: the newest whole one is gone on with
  candidates/N/         checkpoint of the candidate after event N, and verdicts/N.json what was said of it
  journal.jsonl         what was done and why; a snapshot says how long it was
  status.json           a summary, for people and dashboards: nothing is decided by it
  paused                while it is there nothing is learned
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bem.errors import DataError, OnlineError, TrainingError
from bem.files import json_lines, locked, read_json, write_json, write_text
from bem.training.state import check_same_run, read_state, write_state

LABEL = "the learner"
KEPT = 3
"""Snapshots that stay: should the newest be damaged, an older one is gone on with."""


@dataclass
class Desk:
    """The folder of one learner."""

    folder: Path
    epoch: int = 0
    problems: list[str] = field(default_factory=list)
    """Snapshots that were found damaged."""

    @property
    def journal(self) -> Path:
        """What was done and why."""
        return self.folder / "journal.jsonl"

    @property
    def snapshots(self) -> Path:
        """Where they lie."""
        return self.folder / "snapshots"

    def candidate(self, number: int) -> Path:
        """Checkpoint of the candidate that was made after an event."""
        return self.folder / "candidates" / str(number)

    def verdict(self, number: int) -> Path:
        """What was said of it."""
        return self.folder / "verdicts" / f"{number}.json"

    # --- one writer -------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one writer, under a new epoch.

        Raises:
            OnlineError: somebody else is, or the folder cannot be written.
        """
        busy = OnlineError(
            f"{self.folder} has a writer already: one learner at a time. Stop it, or name another folder."
        )
        with _disk(self.folder), locked(self.folder / ".lock", busy):
            self.epoch = self._written_epoch() + 1
            write_json(self.folder / "epoch.json", {"epoch": self.epoch, "pid": os.getpid()})
            yield

    def check_epoch(self) -> None:
        """Raise OnlineError if another writer has begun since: file locks do not hold everywhere."""
        if (now := self._written_epoch()) != self.epoch:
            raise OnlineError(
                f"{self.folder}: a writer of epoch {now} has begun, this one is of epoch {self.epoch}: it stops here "
                "and has written nothing since."
            )

    def _written_epoch(self) -> int:
        path = self.folder / "epoch.json"
        return int(read_json(path, OnlineError)["epoch"]) if path.is_file() else 0

    # --- snapshots --------------------------------------------------------------------------------

    def save(self, number: int, state: Mapping[str, Any], kept: int = KEPT) -> None:
        """Write a snapshot, whole or not at all, and drop the oldest.

        Args:
            number: rounds done; a second snapshot of the same number replaces the first.
            kept: how many stay; 1 after somebody was erased.

        Raises:
            OnlineError: another writer has begun, or the disk is full; earlier snapshots are whole.
        """
        self.check_epoch()
        self.snapshots.mkdir(parents=True, exist_ok=True)
        with _disk(self.folder):
            write_state(self.snapshots / f"{number:09d}.pt", state)
            for old in self._snapshots()[kept:]:
                old.unlink()

    def newest(self, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
        """The newest whole snapshot; None: there is none. Damaged ones are named in `problems`.

        Raises:
            OnlineError: all are damaged, or it is another learner's.
        """
        found = self._snapshots()
        for path in found:
            try:
                state = read_state(path, "cpu", LABEL)
            except TrainingError as damaged:
                self.problems.append(str(damaged))
                continue
            self._check_same(path, state, fingerprint)
            return state
        if found:
            raise OnlineError("no snapshot is whole:\n  " + "\n  ".join(self.problems))
        return None

    def _check_same(self, path: Path, state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        try:
            check_same_run(path, json.loads(state["fingerprint"]), now, LABEL)
        except TrainingError as other:
            raise OnlineError(str(other)) from None

    def _snapshots(self) -> list[Path]:
        return sorted(self.snapshots.glob("[0-9]*.pt"), reverse=True)

    # --- the journal ------------------------------------------------------------------------------

    def note(self, event: int, what: str, **more: Any) -> None:
        """Append a line."""
        line = json.dumps({"event": event, "what": what, **more}, ensure_ascii=False)
        with _disk(self.folder), open(self.journal, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def journal_size(self) -> int:
        """Bytes."""
        return self.journal.stat().st_size if self.journal.is_file() else 0

    def cut_journal(self, size: int) -> None:
        """Drop what was written after a snapshot: it is going to be done again."""
        if self.journal_size() > size:
            with _disk(self.folder), open(self.journal, "r+b") as file:
                file.truncate(size)
                os.fsync(file.fileno())

    def entries(self) -> list[dict[str, Any]]:
        """Lines of the journal; a torn last one is left out."""
        if not self.journal.is_file():
            return []
        found = []
        try:
            for _, values in json_lines(self.journal):
                found.append(values)
        except DataError:
            pass  # a writer was killed within its last line, which a resumed one writes again
        return found

    # --- for people -------------------------------------------------------------------------------

    def show(self, status: Mapping[str, Any]) -> None:
        """Write the summary."""
        with _disk(self.folder):
            write_json(self.folder / "status.json", {**status, "epoch": self.epoch})

    def status(self) -> dict[str, Any]:
        """The summary.

        Raises:
            OnlineError: there is no learner here.
        """
        if not (self.folder / "status.json").is_file():
            raise OnlineError(
                f"{self.folder} is no learner's folder: `bem online replay` or `bem serve --learn` makes one."
            )
        return read_json(self.folder / "status.json", OnlineError)

    @property
    def paused(self) -> bool:
        """Has somebody asked for learning to stop?"""
        return (self.folder / "paused").exists()

    def pause(self, reason: str) -> None:
        """Nothing is learned from the next round on; answers and watches go on."""
        self.status()
        write_text(self.folder / "paused", reason + "\n")

    def resume(self) -> bool:
        """Learn again; False: it was not paused."""
        self.status()
        was = self.paused
        (self.folder / "paused").unlink(missing_ok=True)
        return was

    def drop_candidate(self, number: int) -> None:
        """Remove the working copy of a candidate: the store holds it."""
        shutil.rmtree(self.candidate(number), ignore_errors=True)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failed:
        raise OnlineError(
            f"{folder} could not be written: {failed}. The last snapshot is whole; make room and start again."
        ) from failed
