"""The version store: releases, which of them is in use, and how it came to it.

    STORE/
      objects/SHA256        files of releases and the verdicts they rest on; what releases share is here once
      releases/ID.json      manifests; the id is the sha256 of the manifest
      current.json          the pointer: the one thing that moves
      ledger.jsonl          who put what into use, when, by which verdict

Written in this order, each synced before the next, so that a kill at any instant leaves the store as it was
or as it was to be. Writers wait for one another; readers need no lock. Checksums find damage and edits by
hand; they do not stop somebody who may write to the folder and computes them anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from bem.errors import BaseMismatch, CheckpointError, ConfigError, NotAccepted
from bem.runs.journal import Journal, account, utc_now
from bem.runs.ledger import Ledger, in_use
from bem.runs.release import SHORT, Content, Grounds, Release
from bem.runs.shelf import Shelf
from bem.runs.taken import Taken, damage_of, good

log = logging.getLogger(__name__)

BASE = "base"
"""What `rollback` is told to go back to the bare base."""
SHORTEST = 4
"""Digits that are enough to name a version, if they name one alone."""


class Store:
    """A version store in a folder, which the first promotion or import makes. One store serves one base.

    Args:
        by: who stands in the ledger; None: the account that this process runs under.
        clock: gives the time that stands there.
    """

    def __init__(
        self, path: str | Path, by: str | None = None, clock: Callable[[], datetime] = utc_now
    ):
        self.path = Path(path)
        self.journal = Journal(self.path, by or account(), clock)
        self.shelf = Shelf(self.path / "objects", self.path / "releases")

    # --- reading ----------------------------------------------------------------------------------

    def current(self) -> Release | None:
        """What is in use, every file checked; None: the bare base.

        Raises:
            CheckpointError: there is no store, or something that it takes is damaged.
        """
        return self.shelf.whole(self.journal.look().agreed().release)

    def load_current(self, base: Mapping[str, str] | None = None) -> Taken:
        """What is in use; where that is damaged, the newest whole release that was in use before it.

        Args:
            base: digest, shapes and dtype of the base it is to act on; None: not checked here.
        Raises:
            CheckpointError: there is no store, or no release in it is whole.
            BaseMismatch: it was made for another base.
        """
        look = self.journal.look()
        problems = damage_of(look.ledger)
        try:
            taken = good(self.shelf, look, problems)
        except CheckpointError:
            if self.journal.look() == look:
                raise
            return self.load_current(base)
        if problems and self.journal.look() != look:  # somebody wrote meanwhile
            return self.load_current(base)
        for problem in problems:
            log.error("%s", problem)
        if base is not None and taken.release is not None:
            _check_base(taken.release, base)
        return Taken(taken.release, taken.why, tuple(problems))

    def known(self) -> list[Release]:
        """Releases that are kept and whose manifest can be read, the one that was mentioned last first.

        Raises:
            CheckpointError: there is no store.
        """
        entries = reversed(self.journal.ledger().entries)
        mentioned = dict.fromkeys(entry.release for entry in entries if entry.release)
        return [release for name in mentioned if (release := self._readable([name]))]

    def find(self, name: str) -> Release:
        """The release whose version, or id, begins with these digits; of several of one version, the newest.

        Raises:
            CheckpointError: none, or several versions.
        """
        kept = self.known()
        known = ", ".join(dict.fromkeys(release.short for release in kept)) or "none"
        found = [r for r in kept if r.version.startswith(name) or r.id.startswith(name)]
        if len(name) < SHORTEST or not found:
            raise CheckpointError(
                f"{self.path} has no whole version {name!r} (give {SHORTEST} digits or more). It has: {known}."
            )
        if len({release.version for release in found}) > 1:
            raise CheckpointError(f"{name!r} begins several versions. There are: {known}.")
        return found[0]

    # --- writing ----------------------------------------------------------------------------------

    def promote(self, content: Content, grounds: Grounds) -> Release:
        """Put a checkpoint into use. That its verdict holds was checked by `promotion.accepted`.

        Returns:
            The release; where the same is in use already by the same verdict, that one.
        Raises:
            NotAccepted: the store serves another base.
            CheckpointError: the store is damaged or cannot be written; what is in use stays.
        """
        with self.journal.writing() as state:
            self._keep(content, state.ledger)
            self.shelf.keep(grounds.verdicts, grounds.sha256)
            before = state.agreed().release
            now = self._readable([before])
            if now and (now.files, now.verdict) == (content.files, grounds.sha256):
                return now
            source = f"{grounds.run}: {grounds.arm}, seed {grounds.seed}"
            release = Release.of(content, grounds.sha256, before, source)
            self.shelf.put(release)
            self.journal.move(state.ledger, "promote", release, source)
            return release

    def rollback(self, to: str | None = None, *, reason: str) -> Release | None:
        """Go back to what was in use before.

        Args:
            to: digits that a version begins with, or `base`; None: what was in use before the current one.
            reason: stands in the ledger.
        Returns:
            What is in use now; None: the bare base.
        Raises:
            ConfigError: no reason is given.
            NotAccepted: it is in use already, or never was.
            CheckpointError: the store or that release is damaged, or it is not there; what is in use stays.
        """
        if not reason.strip():
            raise ConfigError("A rollback needs a reason: --reason TEXT. It stands in the ledger.")
        with self.journal.writing() as state:
            name = self._target(to, state.ledger)
            if name == state.agreed().release:
                raise NotAccepted(f"{to or 'The bare base'} is in use already.")
            release = self.shelf.whole(name)
            self.journal.move(state.ledger, "rollback", release, reason.strip())
            return release

    def add(self, content: Content, source: str) -> Release:
        """Keep a checkpoint that nobody judged: it can be served by its version, it is not put into use.

        Raises:
            NotAccepted: the store serves another base.
            CheckpointError: the store is damaged or cannot be written.
        """
        with self.journal.writing() as state:
            self._keep(content, state.ledger)
            release = Release.of(content, None, None, source)
            known = self.shelf.manifest(release.id).is_file()
            self.shelf.put(release)
            if not known:
                self.journal.note(state.ledger, "import", release, source)
            return release

    def _keep(self, content: Content, ledger: Ledger) -> None:
        """Keep the files of a checkpoint for this store's base."""
        served = self._readable([entry.release for entry in reversed(ledger.entries)])
        if served and served.base["digest"] != content.base["digest"]:
            raise NotAccepted(
                f"{content.folder} was made for a base with digest {content.base['digest'][:SHORT]}, {self.path} serves "
                f"one with {served.base['digest'][:SHORT]}: name another folder by --store."
            )
        for name, digest in content.files.items():
            self.shelf.keep(content.folder / name, digest)

    def _readable(self, names: list[str | None]) -> Release | None:
        """The first release whose manifest can be read: a promotion replaces one that is damaged."""
        for name in filter(None, names):
            try:
                return self.shelf.release(name)
            except CheckpointError:
                continue
        return None

    def _target(self, to: str | None, ledger: Ledger) -> str | None:
        """Id of the release that a rollback goes to; None: the bare base."""
        moves = ledger.moves()
        if to is None:
            return ([None, *in_use(moves)])[-2]
        if to == BASE:
            return None
        used = {move.release for move in moves}
        version = self.find(to).version
        found = [r.id for r in self.known() if r.version == version and r.id in used]
        if not found:
            raise NotAccepted(
                f"{to} was never in use: a verdict that says PROMOTE puts a version into use, by `bem promote`."
            )
        return found[0]


def _check_base(release: Release, base: Mapping[str, str]) -> None:
    made, here = release.base["digest"][:SHORT], base["digest"][:SHORT]
    if release.base["digest"] != base["digest"]:
        raise BaseMismatch(
            f"release {release.short} was made for a base with digest {made} in {release.base['dtype']}, this one has "
            f"{here} in {base['dtype']}: load the base that it was made for, or name another --store."
        )
