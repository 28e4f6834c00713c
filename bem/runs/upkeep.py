"""Upkeep of a version store: look at everything, put right what can be, throw away what nobody needs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from bem.errors import CheckpointError, ConfigError
from bem.files import sync_folder, write_bytes
from bem.runs.ledger import Ledger, in_use, without_torn_line
from bem.runs.release import SHORT, Release
from bem.runs.store import Store
from bem.runs.taken import good


def check(store: Store) -> list[str]:
    """Everything that is wrong with a store, after every byte of it was looked at.

    Raises:
        CheckpointError: there is no store.
    """
    look = store.journal.look()
    ledger = look.ledger
    problems = [f"{ledger.path}: {ledger.damage}."] if ledger.damage else []
    if ledger.torn:
        problems.append(f"{ledger.path}: its last line is torn; the next who writes drops it.")
    names: list[str | None] = [path.stem for path in _manifests(store)]
    try:
        names.append(look.agreed().release)
    except CheckpointError as damaged:
        problems.append(str(damaged))
    for name in dict.fromkeys(names):
        try:
            store.shelf.whole(name)
        except CheckpointError as damaged:
            problems.append(str(damaged))
    return problems


@dataclass(frozen=True)
class Collected:
    """What was thrown away."""

    releases: tuple[str, ...]
    """Their ids."""
    objects: int
    bytes: int


def collect(store: Store, keep: int) -> Collected:
    """Throw away the releases that were not used last, and every file that no release names.

    What is in use stays, and what a rollback would go back to; so do the `keep` releases that the ledger
    mentions last. The ledger stays whole, and names what is gone.

    Args:
        keep: how many releases stay at least.
    Raises:
        ConfigError: keep is below 1.
        CheckpointError: something is damaged: then nothing is thrown away.
    """
    if keep < 1:
        raise ConfigError(f"keep must be 1 or more, got {keep}: what is in use stays in any case.")
    with store.journal.writing() as state:
        stay = _staying(state.ledger, keep)
        kept = [store.shelf.release(p.stem) for p in _manifests(store) if p.stem in stay]
        named = set[str]().union(*(release.objects for release in kept))
        gone = [path for path in _manifests(store) if path.stem not in stay]
        folders = (store.path, store.shelf.objects, store.shelf.releases)
        drafts = [path for folder in folders for path in folder.glob(".*.draft")]
        objects = [p for p in store.shelf.objects.glob("[!.]*") if p.name not in named]
        size = sum(path.stat().st_size for path in (*gone, *drafts, *objects))
        if not (gone or drafts or objects):
            return Collected((), 0, 0)
        words = ", ".join(path.stem[:SHORT] for path in gone) or "none"
        what = f"{len(objects)} files and these releases are gone: {words}"
        store.journal.note(state.ledger, "collect", None, what)
        for folder, paths in ((store.shelf.releases, gone), (store.shelf.objects, objects)):
            for path in paths:  # manifests first: none ever names a file that is gone
                path.unlink()
            sync_folder(folder)
        for path in drafts:  # of writers that were killed
            path.unlink()
        return Collected(tuple(path.stem for path in gone), len(objects), size)


def _staying(ledger: Ledger, keep: int) -> set[str]:
    """Ids of the releases that `collect` keeps."""
    mentioned = dict.fromkeys(e.release for e in reversed(ledger.entries) if e.release)
    needed = [name for name in in_use(ledger.moves())[-2:] if name]
    return {*needed, *list(mentioned)[:keep]}


@dataclass(frozen=True)
class Repaired:
    """What was put right."""

    release: Release | None
    """In use now; None: the bare base."""
    done: tuple[str, ...]
    """Empty: there was nothing to do."""


def repair(store: Store, reason: str) -> Repaired:
    """Bring pointer and ledger back in step after damage; nothing that is whole is lost.

    Of a damaged ledger the part before the damage goes on, the whole file stays beside it. What the pointer
    names is in use if it is whole, else the last good release. Damaged files of a release are put right by
    promoting or importing it again.

    Args:
        reason: stands in the ledger.
    Raises:
        CheckpointError: no store, no whole release, or the disk is full or not writable.
    """
    journal = store.journal
    journal.ledger()  # a repair makes no store
    with journal.locked():
        look = journal.look()
        ledger = look.ledger
        try:
            release = store.shelf.whole(look.agreed().release)
            if not ledger.torn and not ledger.damage:
                return Repaired(release, ())
        except CheckpointError:  # that is what is repaired
            release = good(store.shelf, look, []).release
        done = []
        if ledger.damage:
            done.append(f"the damaged ledger is kept as {_set_aside(ledger)}")
        if ledger.torn:
            done.append(f"a torn line of {len(ledger.torn)} bytes was dropped")
        ledger = without_torn_line(Ledger(ledger.path, ledger.entries, ledger.torn))
        done.append(f"{release.short if release else 'the bare base'} is in use")
        journal.move(ledger, "repair", release, "; ".join([reason.strip(), *done]))
        return Repaired(release, tuple(done))


def _set_aside(ledger: Ledger) -> str:
    """Keep a damaged ledger under another name, and the whole entries under its own."""
    raw = ledger.path.read_bytes()
    aside = ledger.path.with_name(f"ledger.damaged-{hashlib.sha256(raw).hexdigest()[:SHORT]}.jsonl")
    write_bytes(aside, raw)
    write_bytes(ledger.path, b"".join(entry.line() for entry in ledger.entries))
    return aside.name


def _manifests(store: Store) -> list[Path]:
    return sorted(store.shelf.releases.glob("[!.]*.json"))
