"""The folder of an index: generations, and a manifest that says which one is in use.

    DIR/
      manifest.json     which generation, of which corpus and encoder, and the sha256 of each file
      g-KEY/            passages.jsonl offsets.npy bm25/ [vectors.npy whitening.npz vectors.faiss]
      .lock             held while somebody builds

Anything else in the folder is somebody else's and stays.

A generation's name is a hash of everything it is made from. So an interrupted build finds what it had
finished when the same command runs again, while a build of something else works beside the
generation in use. The manifest is replaced last, in one move: queries see the old index until then,
and readers that have it open keep it after that, because they hold its files mapped.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from bem.errors import DataError
from bem.evidence.encoders import Encoder
from bem.evidence.passages import Passage
from bem.files import sha256_file, whole, write_json

FORMAT = "bem-index-1"
"""Of the folder and of the terms in it: changes with the way in which text is split into words."""
MANIFEST = "manifest.json"
PASSAGES, OFFSETS, LEXICAL = "passages.jsonl", "offsets.npy", "bm25"
LOCK = ".lock"
_GENERATION = re.compile("g-[0-9a-f]{16}")

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class EncoderFacts:
    """Which encoder made the vectors."""

    name: str
    hash: str
    dimension: int

    @classmethod
    def of(cls, encoder: Encoder | None) -> EncoderFacts | None:
        return cls(encoder.name, encoder.hash, encoder.dimension) if encoder else None

    def check(self, encoder: Encoder) -> None:
        """DataError if this encoder is another one."""
        if encoder.hash != self.hash:
            raise DataError(
                f"The index was made with encoder {self.name} ({self.hash[:12]}), this one is "
                f"{encoder.name} ({encoder.hash[:12]}): their vectors cannot be compared. Open the "
                "index with its own encoder, or build it again."
            )


@dataclass(frozen=True)
class Manifest:
    """What the folder of an index holds."""

    generation: str  # name of the sub-folder in use
    corpus_hash: str
    passages: int  # searchable ones
    copies: int  # passages left out because an earlier one shows the same text
    encoder: EncoderFacts | None
    search: str  # of vectors: none | exact | hnsw
    files: dict[str, dict[str, Any]]  # path in the generation -> bytes, sha256
    format: str = FORMAT


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index.

    Raises:
        DataError: there is none, it is damaged, or it is of a format that this version cannot read.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder} is no index: it has no {MANIFEST}. `bem index build CORPUS.jsonl --out "
            f"{folder}` makes one, or finishes one that was interrupted."
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}). Build the index again.") from None
    written = values.get("format") if isinstance(values, dict) else None
    if written != FORMAT:
        raise DataError(
            f"{path} has format {written!r}, this version reads {FORMAT!r}. Build the index again."
        )
    try:
        encoder = values.pop("encoder")
        return Manifest(encoder=EncoderFacts(**encoder) if encoder else None, **values)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}). Build the index again.") from None


def refuse_foreign(folder: Path) -> None:
    """DataError if the folder's manifest is that of something else: a build would write over it."""
    path = folder / MANIFEST
    if not path.exists():
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # damaged: ours only if it stands beside what a build leaves
        ours = any(generations(folder))
    else:
        ours = isinstance(values, dict) and str(values.get("format", "")).startswith("bem-index-")
    if not ours:
        raise DataError(
            f"{path} is not the manifest of an index. Give the index a folder of its own."
        )


def generations(folder: Path) -> Iterator[Path]:
    """Sub-folders that builds have made."""
    for path in sorted(folder.glob("g-*")):
        if _GENERATION.fullmatch(path.name) and path.is_dir():
            yield path


def publish(folder: Path, manifest: Manifest, entries: Sequence[str]) -> None:
    """Make a finished generation the one in use, then delete all others.

    Args:
        entries: names that a build leaves in a generation.
    """
    write_json(folder / MANIFEST, asdict(manifest))
    for other in generations(folder):
        if other.name != manifest.generation:
            remove_generation(other, entries)


def remove_generation(generation: Path, entries: Sequence[str]) -> None:
    """Delete what a build has left there, and the folder unless it holds something else."""
    for name in [part for entry in entries for part in (entry, f"{entry}.part")]:
        path = generation / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: the rest is not ours
        generation.rmdir()


def describe_files(generation: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of a generation."""
    paths = sorted(path for path in generation.rglob("*") if path.is_file())
    return {
        path.relative_to(generation).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in paths
    }


def check_files(folder: Path, manifest: Manifest, checksums: bool = True) -> None:
    """Every file is there, as long as it was, and (with `checksums`) with the same content.

    Raises:
        DataError: names the file and what is wrong with it.
    """
    generation = folder / manifest.generation
    for name, recorded in manifest.files.items():
        path = generation / name
        if not path.is_file():
            raise DataError(f"{path} is missing: the index is damaged. {_again(folder)}")
        size = path.stat().st_size
        if size != recorded["bytes"]:
            raise DataError(
                f"{path} has {size:,} bytes, the manifest says {recorded['bytes']:,}: the index is "
                f"damaged. {_again(folder)}"
            )
        if checksums and sha256_file(path) != recorded["sha256"]:
            raise DataError(
                f"{path} is not the file that the manifest describes (its sha256 differs): the "
                f"index was changed or damaged. {_again(folder)}"
            )


class StoredPassages(Sequence[Passage]):
    """Passages of a generation, read from a memory-mapped file when asked for."""

    def __init__(self, generation: Path):
        self._offsets = np.load(generation / OFFSETS, mmap_mode="r")
        with (generation / PASSAGES).open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice) -> list[Passage]: ...
    def __getitem__(self, index: int | slice) -> Passage | list[Passage]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]  # also turns -1 into the last, and refuses what is outside
        line = self._bytes[int(self._offsets[at]) : int(self._offsets[at + 1])]
        return Passage(*json.loads(line))

    @staticmethod
    def write(generation: Path, passages: Sequence[Passage]) -> None:
        """One JSON array (id, text, title) per line, and where each line begins."""
        offsets = np.zeros(len(passages) + 1, np.uint64)
        with whole(generation / PASSAGES) as draft, draft.open("wb") as file:
            for number, passage in enumerate(passages, 1):
                # ASCII: also texts with half a surrogate pair come back as they were.
                file.write(json.dumps([passage.id, passage.text, passage.title]).encode())
                file.write(b"\n")
                offsets[number] = file.tell()
        with whole(generation / OFFSETS) as draft, draft.open("wb") as file:
            np.save(file, offsets)


def _again(folder: Path) -> str:
    return f"Build it again: `bem index build CORPUS.jsonl --out {folder}`."
