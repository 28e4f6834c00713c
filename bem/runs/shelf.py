"""What a version store keeps: files under their sha256, and the manifests of releases that name them.

Nothing here is ever changed, and what two releases share is kept once. Every read is checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bem.errors import CheckpointError
from bem.files import sha256_file, write_bytes
from bem.runs.release import Release, parse_release


@dataclass(frozen=True)
class Shelf:
    """The two folders."""

    objects: Path
    releases: Path

    def keep(self, source: Path, digest: str) -> None:
        """Keep a copy of a file whose sha256 is known; one that is here but damaged is replaced.

        Raises:
            CheckpointError: the file is another one now.
            OSError: the disk is full or not writable.
        """
        target = self.objects / digest
        if target.is_file() and sha256_file(target) == digest:
            return
        raw = source.read_bytes()
        if (actual := hashlib.sha256(raw).hexdigest()) != digest:
            raise CheckpointError(
                f"{source} was changed while it was read (sha256 {actual[:12]}, expected {digest[:12]}). Try again."
            )
        write_bytes(target, raw)

    def put(self, release: Release) -> None:
        """Write a manifest, after the files that it names; one that is here but damaged is replaced.

        Raises:
            OSError: the disk is full or not writable.
        """
        raw, path = release.to_bytes(), self.manifest(release.id)
        if not path.is_file() or path.read_bytes() != raw:
            write_bytes(path, raw)

    def manifest(self, name: str) -> Path:
        """Where the manifest of an id lies."""
        return self.releases / f"{name}.json"

    def release(self, name: str) -> Release:
        """The release of an id; its files are not looked at.

        Raises:
            CheckpointError: its manifest is missing or damaged.
        """
        path = self.manifest(name)
        return parse_release(_checked(path, name), str(path))

    def whole(self, name: str | None) -> Release | None:
        """A release, after every file it names was checked; of None, the bare base: None.

        Raises:
            CheckpointError: something is missing or damaged.
        """
        if name is None:
            return None
        release = self.release(name)
        for digest in sorted(release.objects):
            _checked(self.objects / digest, digest)
        return release

    @contextlib.contextmanager
    def folder(self, release: Release) -> Iterator[Path]:
        """The release as the folder of a checkpoint, there as long as the context lasts.

        It is a copy, made of the bytes that were checked: whatever reads it cannot reach the store.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        with tempfile.TemporaryDirectory(prefix="bem-release-") as made:
            self._unpack(release, Path(made))
            yield Path(made)

    def _unpack(self, release: Release, folder: Path) -> None:
        for name, digest in release.files.items():
            raw = _checked(self.objects / digest, digest)
            try:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(raw)
            except OSError as failed:
                raise CheckpointError(
                    f"release {release.short} could not be unpacked: {failed}. Set TMPDIR to a folder with room."
                ) from failed


def _checked(path: Path, digest: str) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as failed:
        raise CheckpointError(
            f"{path} cannot be read ({failed.strerror}). Promote or import again what it came from, or `bem rollback`."
        ) from None
    if (actual := hashlib.sha256(raw).hexdigest()) != digest:
        raise CheckpointError(
            f"{path} was changed after it was written: its sha256 is {actual[:12]}. Promote or import again what it "
            "came from, which replaces it, or `bem rollback`."
        )
    return raw
