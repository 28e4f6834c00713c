"""Checkpoints: what PEFT writes (safetensors and `adapter_config.json`) plus a manifest.

The manifest names the adapter's config, the hashes of base and data, the parent checkpoint and the
sha256 of every file. Loading checks all of it: a checkpoint that was changed, or that was made for
another base, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bem.adapters.lora import (
    CONFIG,
    WEIGHTS,
    Lora,
    read_json,
    read_lora,
    read_tensors,
    readable,
    write_loras,
)
from bem.adapters.sites import ATTN_OUT, MLP_DOWN, base_hash, find_sites
from bem.config import AdapterConfig, parse
from bem.errors import AttachError, BaseMismatch, CheckpointError
from bem.variants.low_rank import LowRank

if TYPE_CHECKING:
    from bem.adapters.attach import Attached

MANIFEST = "manifest.json"
FORMAT = 1


def save(
    attached: Attached, folder: Path, data_hash: str, parent: str | None, extra: dict[str, Any]
) -> Path:
    """Write the checkpoint whole or not at all (a folder beside it is renamed into place).

    Args:
        attached: what to save.
        folder: target; an older checkpoint there is replaced.
        data_hash: sha256 of the training data.
        parent: sha256 of the manifest of the checkpoint that training started from.
        extra: anything JSON that belongs to the record.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        attached.model.save_pretrained(str(work))
        manifest = {
            "format": FORMAT,
            "adapter": attached.config.model_dump(mode="json"),
            "base": base_hash(attached.base),
            "data": data_hash,
            "parent": parent,
            "extra": extra,
            "files": {f.name: file_hash(f) for f in sorted(work.iterdir()) if f.is_file()},
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        readable(work)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(work, folder)
    except OSError as error:
        raise CheckpointError(
            f"could not write the checkpoint {folder}: {error}. Nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def load(model: Any, folder: Path, trainable: bool) -> Attached:
    """See `bem.load`."""
    config_file = folder / CONFIG
    if not config_file.is_file():
        raise CheckpointError(f"{folder} holds no adapter_config.json: not a checkpoint.")
    if read_json(config_file).get("peft_type") == "LORA":
        return _load_lora(model, folder, trainable)
    manifest = check(folder)
    found = base_hash(model)
    if manifest["base"] != found:
        raise BaseMismatch(
            f"{folder} was made for a base with hash {manifest['base'][:12]}, this one has {found[:12]}: "
            "other weights give another model. Load the base that it was trained on."
        )
    return _attach_tensors(
        model, parse(AdapterConfig, manifest["adapter"], str(folder)), folder, trainable
    )


def check(folder: Path) -> dict[str, Any]:
    """Read the manifest and compare the sha256 of every file.

    Raises:
        CheckpointError: no manifest, a missing file or a changed one.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}, so nothing proves what it is. Written by PEFT alone? Load it with "
            "peft.PeftModel.from_pretrained and save it with Attached.save."
        )
    manifest = read_json(folder / MANIFEST)
    for name, digest in manifest.get("files", {}).items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing.")
        if (found := file_hash(folder / name)) != digest:
            raise CheckpointError(
                f"{folder}: {name} was changed after saving (sha256 {found[:12]}, manifest says {digest[:12]})."
            )
    if WEIGHTS not in manifest.get("files", {}):
        raise CheckpointError(f"{folder}: the manifest lists no {WEIGHTS}.")
    return manifest


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_lora(attached: Attached, folder: Path) -> Path:
    """Write a static LoRA as PEFT writes one: lora_A = V, lora_B = U, same alpha and ranks."""
    from bem.adapters.attach import NAME
    from bem.adapters.peft_method import adapters_of

    loras = {}
    for site, part in adapters_of(attached.base, NAME):
        if not isinstance(part.update, LowRank):
            raise AttachError(
                f"{attached.config.variant} changes from chunk to chunk: only s0 is a plain LoRA."
            )
        loras[site] = Lora(part.update.v, part.update.u, part.update.scale)
    return write_loras(loras, folder)


def _load_lora(model: Any, folder: Path, trainable: bool) -> Attached:
    """Read a PEFT LoRA checkpoint as s0."""
    from bem.adapters.attach import NAME, attach
    from bem.adapters.peft_method import adapters_of

    loras = read_lora(model, folder)
    rank = max(len(lora.a) for lora in loras.values())
    attached = attach(model, "s0", rank=rank, router_layer=0, sites=_only(model, loras))
    for site, part in adapters_of(attached.base, NAME):
        assert isinstance(part.update, LowRank)
        if (lora := loras.get(site)) is None:  # a site that this LoRA leaves alone
            part.update.v.data = part.update.v.data[:1] * 0
            part.update.u.data = part.update.u.data[:, :1] * 0
            continue
        part.update.v.data = lora.a.to(part.update.v)
        part.update.u.data = lora.b.to(part.update.u)
        part.update.scale = lora.scale
    if not trainable:
        _freeze(attached)
    return attached


def _only(model: Any, wanted: Iterable[str]) -> dict[str, str | list[str]]:
    """Site overrides that name exactly these layers."""
    roles: dict[str, str | list[str]] = {}
    for role in (ATTN_OUT, MLP_DOWN):
        named = [s.name for s in find_sites(model).found if s.role == role and s.name in wanted]
        roles[role] = named or ["(none)"]
    return roles


def _attach_tensors(model: Any, config: AdapterConfig, folder: Path, trainable: bool) -> Attached:
    from peft import set_peft_model_state_dict

    from bem.adapters.attach import attach

    attached = attach(model, config)
    result = set_peft_model_state_dict(attached.model, read_tensors(folder))
    if result.unexpected_keys:
        raise CheckpointError(
            f"{folder}: {len(result.unexpected_keys)} tensors fit nothing in this model."
        )
    if not trainable:
        _freeze(attached)
    return attached


def _freeze(attached: Attached) -> None:
    for parameter in attached.parameters():
        parameter.requires_grad = False
    attached.model.eval()
