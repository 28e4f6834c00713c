"""Checkpoints that a version store keeps: small files that nobody trained, with true manifests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bem.runs.release import Content, Grounds, read_content
from bem.runs.store import Store

BASE = {"digest": "b" * 64, "shapes": "5" * 64, "dtype": "float32"}
WEIGHTS = "adapter_model.safetensors"


def sha256(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def make_content(
    folder: Path, files: Mapping[str, str], kind: str = "adapter", base: Mapping[str, str] = BASE
) -> Content:
    """A checkpoint with these texts as its files; its version is the digest of them."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    manifest = {
        "kind": kind,
        "base": dict(base),
        "version": {"digest": sha256(json.dumps(dict(files)))},
        "files": {name: sha256(text) for name, text in files.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return read_content(folder)


def make_grounds(folder: Path, arm: str = "v1") -> Grounds:
    path = folder / f"{arm}-verdicts.json"
    path.write_text(json.dumps({"candidates": {arm: "PROMOTE"}}))
    return Grounds("run", arm, 0, path, sha256(path.read_bytes()))


class Clock:
    """One second later at every look."""

    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


def make_store(folder: Path, *names: str) -> Store:
    """A store, made in `folder`/store, with adapters of these names promoted one after the other."""
    store = Store(folder / "store", by="ada", clock=Clock())
    for name in names:
        promote(store, folder, name)
    return store


def promote(store: Store, folder: Path, name: str):
    content = make_content(folder / name, {WEIGHTS: f"weights of {name}"})
    return store.promote(content, make_grounds(folder, name))


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
