"""Models on this machine: made once, and used from there without network.

    CACHE/models/KEY/          a model's folder as transformers writes it, and bem-model.json: what it was
                               made of and the sha256 of every file

CACHE is $BEM_CACHE, or `bem` in the user's cache folder. KEY is the model's name, or for a .gguf file
its name and digest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from bem.bases.named import Named
from bem.errors import BaseError
from bem.files import check_listed, locked, read_json, sha256_file, whole_folder, write_json

MANIFEST = "bem-model.json"
FORMAT = 1

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where models are kept."""
    return Path(os.environ.get("BEM_CACHE") or user_cache_path("bem"))


def is_here(model: Named) -> bool:
    """Can it be used without network?"""
    return isinstance(model.source, Path) or (_place(model.name) / MANIFEST).is_file()


def _place(key: str) -> Path:
    return cache_folder() / "models" / key


def kept(key: str, source: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder of a key; made of its source by `make` if it is not there, or was made of another.

    Raises:
        BaseError: the folder holds what was not made here: nothing is deleted.
    """
    folder = _place(key)
    with locked(folder.with_name(f".{key}.lock")):  # two processes fetch it once
        if _manifest(folder).get("source") == source:
            return folder
        log.info("%s is made ready in %s: once", key, folder)
        with whole_folder(folder, _ours, BaseError) as work:
            make(work)
            files = {name: sha256_file(work / name) for name in sorted(_all_files(work))}
            write_json(work / MANIFEST, {"format": FORMAT, "source": source, "files": files})
    return folder


def check(folder: Path) -> None:
    """Are all files of a kept model what they were when it was made?

    Raises:
        BaseError: names the first that is not.
    """
    check_listed(folder, _manifest(folder).get("files"), BaseError)


def _manifest(folder: Path) -> dict[str, Any]:
    """What is said of a kept model; empty: it is not one."""
    path = folder / MANIFEST
    said = read_json(path, BaseError) if path.is_file() else {}
    return said if isinstance(said, dict) else {}


def _ours(folder: Path) -> list[str]:
    return [MANIFEST, *_manifest(folder).get("files", ())]


def _all_files(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
