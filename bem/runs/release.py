"""A release: a static adapter, or a router with its experts, as a manifest that names files by sha256.

Its id is the sha256 of the manifest: whoever has the id can tell whether manifest and files are the ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bem.errors import CheckpointError
from bem.files import check_listed, read_json, sha256_file

FORMAT = 1
MANIFEST = "manifest.json"
KINDS = ("adapter", "router")
SHORT = 12
"""Digits of a digest that people are shown."""


@dataclass(frozen=True)
class Content:
    """A checkpoint's folder whose files are what its manifest lists."""

    folder: Path
    kind: str
    version: str
    """Digest of what acts."""
    base: Mapping[str, str]
    """Digest, shapes and dtype of the base, as `bem.adapters.version.BaseIdentity` has them."""
    files: Mapping[str, str]
    """Name in the folder -> sha256."""


@dataclass(frozen=True)
class Grounds:
    """The verdict that lets a checkpoint into use."""

    run: str
    arm: str
    seed: int
    verdicts: Path
    """The run's verdicts.json."""
    sha256: str
    """Of that file."""


@dataclass(frozen=True)
class Release:
    """What is kept of a checkpoint."""

    kind: str
    version: str
    base: Mapping[str, str]
    files: Mapping[str, str]
    verdict: str | None
    """sha256 of the verdicts.json that it rests on, which is kept too; None: imported, never judged."""
    parent: str | None
    """Id of the release that was in use before; None: the bare base was."""
    source: str
    """Where it comes from, for people."""

    @staticmethod
    def of(content: Content, verdict: str | None, parent: str | None, source: str) -> Release:
        """The release of a checkpoint's content."""
        base, files = dict(content.base), dict(content.files)
        return Release(content.kind, content.version, base, files, verdict, parent, source)

    def to_bytes(self) -> bytes:
        """The manifest."""
        values = {"format": FORMAT, **asdict(self)}
        return (json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @property
    def id(self) -> str:
        """sha256 of the manifest."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def short(self) -> str:
        """Its version, as people are shown it."""
        return self.version[:SHORT]

    @property
    def objects(self) -> set[str]:
        """sha256 of everything that is kept for it."""
        return {*self.files.values(), *([self.verdict] if self.verdict else [])}


def parse_release(raw: bytes, where: str) -> Release:
    """The release whose manifest this is.

    Raises:
        CheckpointError: a manifest of another format.
    """
    values = json.loads(raw)
    if values.pop("format", None) != FORMAT:
        raise CheckpointError(f"{where} was written by another version of BEM: update this one.")
    return Release(**values)


def read_content(folder: Path, manifest_sha256: str | None = None) -> Content:
    """What a checkpoint's folder holds, after every file was compared with its manifest.

    Args:
        folder: what `Attached.save` or `Mounted.save` wrote.
        manifest_sha256: of the manifest that is expected; None: whichever is there.
    Raises:
        CheckpointError: no such folder, a missing or changed file, or something that cannot be served.
    """
    path = folder / MANIFEST
    manifest = read_json(path, CheckpointError)
    digest = sha256_file(path)
    if manifest_sha256 not in (None, digest):
        raise CheckpointError(f"{path} was changed after it was judged. Run `bem run` again.")
    try:
        kind, base = manifest.get("kind"), {k: manifest["base"][k] for k in _IDENTITY}
        version, listed = manifest["version"]["digest"], manifest["files"]
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no manifest of a checkpoint of this version ({type(error).__name__} {error}): a release is "
            "what `Attached.save` or `Mounted.save` wrote."
        ) from None
    if kind not in KINDS:
        raise CheckpointError(f"{folder} holds a {kind!r}: a release is one of {', '.join(KINDS)}.")
    check_listed(folder, listed, CheckpointError)
    return Content(folder, kind, version, base, {**_plain(listed, folder), MANIFEST: digest})


_IDENTITY = ("digest", "shapes", "dtype")


def _plain(listed: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The listed files, whose names stay in whatever folder they are written to."""
    for name in listed:
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or name == MANIFEST:
            raise CheckpointError(f"{folder}: its manifest lists {name!r}, which names no file.")
    return dict(listed)
