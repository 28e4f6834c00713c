"""Checkpoints: what PEFT reads (safetensors and `adapter_config.json`) with a manifest beside it.

A static LoRA is written as PEFT's own LoRA, every other variant as PEFT's method "BEM". The manifest
holds the adapter's config, its `Version`, where data and weights come from, and the sha256 of every
file. Loading checks all of it: a checkpoint that was changed, or was made for another base, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from bem.adapters.build import VARIANTS
from bem.adapters.card import CARD, write_card
from bem.adapters.lora import CONFIG, WEIGHTS, Lora, read_json, write_loras
from bem.adapters.version import BaseIdentity, Version, base_identity
from bem.config import AdapterConfig, parse_adapter
from bem.errors import BaseMismatch, CheckpointError
from bem.files import check_listed, sha256_file, whole_folder, write_bytes, write_json, write_text

MANIFEST = "manifest.json"
FORMAT = 2
KIND = "adapter"


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from."""

    data: str = ""
    """sha256 of the training data."""
    parent: str | None = None
    """sha256 of the manifest of the checkpoint that training started from."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Anything JSON that belongs to the record."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose files are as they were written."""

    folder: Path
    config: AdapterConfig
    version: Version
    base: BaseIdentity
    origin: Origin


def write(
    folder: Path,
    config: AdapterConfig,
    version: Version,
    base: BaseIdentity,
    state: Mapping[str, Lora] | tuple[Mapping[str, Tensor], Mapping[str, Any]],
    base_name: str | None,
    origin: Origin,
) -> Path:
    """Write a checkpoint whole or not at all.

    Args:
        folder: made if missing; an older checkpoint there is replaced in one step, its model card kept.
        version, base: what `state` makes of which base.
        state: site -> LoRA of a static adapter; else (tensors, the content of adapter_config.json).
        base_name: what AutoPeft looks up as the base, a hub id or a folder.
    Raises:
        CheckpointError: the folder holds files of somebody else, or cannot be written.
    """
    with whole_folder(folder, written_files, CheckpointError) as work:
        card = _old_card(folder)
        if isinstance(state, tuple):
            tensors, method = state
            plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            write_bytes(work / WEIGHTS, save(plain, metadata={"format": "pt"}))
            write_json(work / CONFIG, method, indent=2)
        else:
            write_loras(state, work, base_name)
        manifest = {
            "format": FORMAT,
            "kind": KIND,
            "adapter": config.model_dump(mode="json"),
            "version": version.to_dict(),
            "base": vars(base),
            "data": origin.data,
            "parent": origin.parent,
            "extra": dict(origin.extra),
            "files": {name: sha256_file(work / name) for name in (CONFIG, WEIGHTS)},
        }
        write_json(work / MANIFEST, manifest, indent=2)
        if card is None:
            write_card(work, base_name, config.variant)
        else:
            write_text(work / CARD, card)
    return folder


def read(folder: Path) -> Saved:
    """Check a checkpoint's files against its manifest and say what they are.

    Raises:
        CheckpointError: no manifest, a missing or changed file, or an older format.
    """
    manifest = check(folder)
    kinds = {kind: each.config for kind, each in VARIANTS.items()}
    try:
        return Saved(
            folder,
            parse_adapter(manifest["adapter"], f"{folder}: {MANIFEST}", kinds),
            Version.from_dict(manifest["version"]),
            BaseIdentity(**manifest["base"]),
            Origin(manifest["data"], manifest["parent"], manifest["extra"]),
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: {MANIFEST} is not what was written: {type(error).__name__} {error}."
        ) from None


def check(folder: Path) -> dict[str, Any]:
    """The manifest of an adapter's checkpoint, after every listed file's sha256 was compared.

    Raises:
        CheckpointError: no manifest, one of something else or of an older format, a missing or a
            changed file.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}: not a checkpoint that BEM wrote.")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("kind") == "router":
        raise CheckpointError(f"{folder} holds a router with its experts: use bem.load_router.")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {manifest.get('format')!r}, this BEM reads {FORMAT}: it was written by another "
            "release. Load and save it there as a PEFT LoRA if it is one, or train it again."
        )
    listed = manifest.get("files")
    check_listed(folder, listed, CheckpointError)
    if not {CONFIG, WEIGHTS} <= listed.keys():
        raise CheckpointError(f"{folder}: the manifest does not list {CONFIG} and {WEIGHTS}.")
    return manifest


def check_base(saved: BaseIdentity, model: nn.Module, what: str) -> None:
    """Is the model the base that something was made for?

    Raises:
        BaseMismatch: says whether it is another model, the same in another dtype, or other weights.
    """
    here = base_identity(model)
    if here.digest == saved.digest:
        return
    start = f"{what} was made for a base with digest {saved.digest[:12]}, this one has {here.digest[:12]}"
    if here.shapes != saved.shapes:
        raise BaseMismatch(
            f"{start}: its layers have other names or shapes. Load the base that it was trained on."
        )
    if here.dtype != saved.dtype:
        raise BaseMismatch(
            f"{start}. It was trained on the base in {saved.dtype}, which is loaded in {here.dtype} here: rounding "
            f"makes other weights. Load the base with dtype='{saved.dtype.split('+')[0]}', or train the adapter "
            f"on the base in {here.dtype}."
        )
    raise BaseMismatch(
        f"{start}: the same layers with other weights. Load the base that it was trained on."
    )


def written_files(folder: Path) -> list[str]:
    """Names in a folder that a checkpoint consists of: those that saving may replace. None, if the
    manifest is somebody else's."""
    if not (folder / MANIFEST).is_file() or read_json(folder / MANIFEST).get("kind") != KIND:
        return []
    return [MANIFEST, CARD, CONFIG, WEIGHTS]


def _old_card(folder: Path) -> str | None:
    card = folder / CARD
    return (
        card.read_text(encoding="utf-8")
        if (folder / MANIFEST).is_file() and card.is_file()
        else None
    )
