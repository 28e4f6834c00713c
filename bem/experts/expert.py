"""Experts: static low-rank updates with a name, from our own s0 checkpoints or from PEFT LoRAs.

An expert is a set of updates, one for each site that it touches, and a digest of them. Where it came
from matters no more after reading: an `ExpertStack` takes them side by side.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bem.adapters import checkpoint
from bem.adapters.attach import NAME, Attached
from bem.adapters.lora import (
    CONFIG,
    WEIGHTS,
    Update,
    check_finite,
    read_json,
    read_lora,
    write_lora,
)
from bem.adapters.peft_method import adapters_of
from bem.errors import AttachError, CheckpointError
from bem.variants.digest import weights_digest
from bem.variants.low_rank import LowRank

__all__ = ["Expert", "Update", "expert_of", "from_updates", "read_expert", "write_lora"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LONGEST_NAME = 100  # bytes; file systems take 255


@dataclass(frozen=True)
class Expert:
    """A static adapter that can be stacked with others."""

    name: str
    updates: dict[str, Update]  # site name, as in `find_linears` -> update
    digest: str  # see `weights_digest`
    source: str  # where it was read from
    about: str = ""


def read_expert(source: str | Path, model: Any, name: str | None = None) -> Expert:
    """Read an expert for `model`.

    Args:
        source: a folder, or the hub id of a PEFT LoRA. Of our own checkpoints only s0, with its
            manifest and the hash of its base checked; any plain PEFT LoRA on linear layers of the blocks.
        model: the base that it will act on.
        name: what to call it; None: the folder's name.
    Raises:
        CheckpointError: missing, changed, or no static low-rank update that fits this model.
        BaseMismatch: made for another base.
    """
    folder = _folder(source)
    if hasattr(model, "get_base_model"):  # a PeftModel: site names are those of the model inside
        model = model.get_base_model()
    overrides, ours = None, False
    if (folder / checkpoint.MANIFEST).is_file():  # one of ours
        saved = checkpoint.read(folder)
        if saved.config.variant != "s0":
            raise CheckpointError(_not_static(saved.config.variant, str(folder)))
        checkpoint.check_base(saved.base, model, str(folder))
        overrides, ours = saved.config.sites, True
    elif read_json(folder / CONFIG).get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} holds no LoRA: an expert is static and low-rank.")
    loras = read_lora(model, folder, overrides, anywhere=not ours)
    updates = {site: lora.update() for site, lora in loras.items()}
    return from_updates(name or Path(str(source)).name, updates, str(source))


def expert_of(attached: Attached, name: str, about: str = "") -> Expert:
    """An expert from a live s0; copies its weights.

    Raises:
        AttachError: the variant is not static, or no plain low-rank update.
    """
    parts = {site: part.update for site, part in adapters_of(attached.base, NAME)}
    if attached.config.variant != "s0":
        raise AttachError(_not_static(attached.config.variant, f"{name}: this adapter"))
    updates = {site: _folded(part) for site, part in parts.items() if isinstance(part, LowRank)}
    return from_updates(name, updates, "attached s0", about)


def from_updates(
    name: str, updates: dict[str, Update], source: str = "", about: str = ""
) -> Expert:
    """An expert from plain factors.

    Raises:
        CheckpointError: no update, factors that do not fit each other, NaN or inf.
    """
    if not updates:
        raise CheckpointError(f"expert {name!r} has no update at all.")
    for site, update in updates.items():
        if update.u.dim() != 2 or update.v.dim() != 2 or update.u.shape[1] != len(update.v):
            raise CheckpointError(
                f"expert {name!r}, {site}: u {tuple(update.u.shape)} and v {tuple(update.v.shape)} have no product."
            )
        check_finite(update, f"expert {name!r}, {site}")
    return Expert(name, dict(updates), _digest(updates), source, about)


def _folded(part: LowRank) -> Update:
    u, v = part.u.detach().cpu().float(), part.v.detach().cpu().float()
    return Update(u * part.scale, v.clone())


def _not_static(variant: str, what: str) -> str:
    why = (
        "a Kronecker update, whose rank is that of the whole layer"
        if variant == "v3"
        else "its update changes from chunk to chunk"
    )
    return f"{what} is {variant}: {why}. Distil it into a static LoRA first; an expert is static and low-rank."


def _folder(source: str | Path) -> Path:
    """The local folder of a source; of a hub id safetensors and config alone are downloaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        raise CheckpointError(f"{source} is neither a folder nor a hub id (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError) as error:  # offline, unknown, gated: all of the hub's errors
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{source} is no folder here and could not be read from the hub ({type(error).__name__}: {reason})."
        ) from None


def _digest(updates: dict[str, Update]) -> str:
    tensors = {f"{s}.{name}": getattr(u, name) for s, u in updates.items() for name in "uv"}
    return weights_digest(tensors)


def check_name(name: str) -> None:
    """Is this a name for an expert? Names become folders.

    Raises:
        AttachError: it would leave its folder, hide it, or cannot be one.
    """
    odd = not name.isprintable() or any(c in name for c in '/\\:*?"<>|')
    if odd or name != name.strip() or name[:1] in ("", ".") or len(name.encode()) > LONGEST_NAME:
        raise AttachError(
            f"{name!r} cannot name an expert, whose name becomes a folder: 1 to {LONGEST_NAME} bytes of letters, "
            "digits and signs are needed, no slash, colon or wildcard, no dot in front, no space around."
        )
    if name == "base":
        raise AttachError(
            "'base' names the bare base among a router's options: call the expert otherwise."
        )
