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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from bem.adapters.low_rank import LowRank
from bem.adapters.sites import base_hash
from bem.config import AdapterConfig, parse
from bem.errors import AttachError, BaseMismatch, CheckpointError

if TYPE_CHECKING:
    from bem.adapters.attach import Attached

MANIFEST = "manifest.json"
WEIGHTS = "adapter_model.safetensors"
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
        _readable(work)
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


def _readable(folder: Path) -> None:
    """The usual rights for a new folder and its files: mkdtemp and safetensors write for us alone."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def load(model: Any, folder: Path, trainable: bool) -> Attached:
    """See `bem.load`."""
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{folder} holds no adapter_config.json: not a checkpoint.")
    if _json(config_file).get("peft_type") == "LORA":
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
    manifest = _json(folder / MANIFEST)
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
    from peft import LoraConfig

    from bem.adapters.attach import NAME
    from bem.adapters.peft_method import adapters_of

    parts = {site: part.update for site, part in adapters_of(attached.base, NAME)}
    if not all(isinstance(update, LowRank) for update in parts.values()):
        raise AttachError(
            f"{attached.config.variant} changes from chunk to chunk: only s0 is a plain LoRA."
        )
    tensors, ranks, alphas = {}, {}, {}
    for site, update in parts.items():
        assert isinstance(update, LowRank)
        tensors[f"base_model.model.{site}.lora_A.weight"] = update.v.detach().cpu().contiguous()
        tensors[f"base_model.model.{site}.lora_B.weight"] = update.u.detach().cpu().contiguous()
        ranks[site] = len(update.v)
        alphas[site] = update.scale * len(update.v)
    first = next(iter(ranks))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=ranks[first],
        lora_alpha=alphas[first],  # type: ignore[arg-type]
        rank_pattern={s: r for s, r in ranks.items() if r != ranks[first]},
        alpha_pattern={s: a for s, a in alphas.items() if a != alphas[first]},
        target_modules=sorted(ranks),
        lora_dropout=0.0,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def _load_lora(model: Any, folder: Path, trainable: bool) -> Attached:
    """Read a PEFT LoRA checkpoint as s0. rsLoRA scales by alpha / sqrt(r); DoRA is refused."""
    from bem.adapters.attach import NAME, attach
    from bem.adapters.peft_method import adapters_of

    config = _json(folder / "adapter_config.json")
    for flag in ("use_dora", "fan_in_fan_out", "lora_bias"):
        if config.get(flag) and flag != "fan_in_fan_out":
            raise CheckpointError(
                f"{folder}: {flag} is not a plain low-rank update; only LoRA and rsLoRA are read."
            )
    tensors = load_file(folder / WEIGHTS)
    loras = _lora_pairs(tensors, folder)
    layers = sorted(loras)
    ranks = {len(a) for a, _ in loras.values()}
    attached = attach(
        model, "s0", rank=max(ranks), router_layer=0, sites=_sites_of(model, layers, folder)
    )
    for site, part in adapters_of(attached.base, NAME):
        assert isinstance(part.update, LowRank)
        a, b = loras.pop(site, (None, None))
        if a is None or b is None:  # a site that this LoRA leaves alone
            part.update.v.data = part.update.v.data[:1] * 0
            part.update.u.data = part.update.u.data[:, :1] * 0
            continue
        rank = _pattern(config.get("rank_pattern"), site, config["r"])
        alpha = _pattern(config.get("alpha_pattern"), site, config["lora_alpha"])
        part.update.v.data = a.to(part.update.v)
        part.update.u.data = b.to(part.update.u)
        part.update.scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    if not trainable:
        _freeze(attached)
    return attached


def _sites_of(model: Any, names: list[str], folder: Path) -> dict[str, str | list[str]]:
    """Site overrides that name exactly the layers of a LoRA checkpoint."""
    from bem.adapters.sites import find_sites

    known = {site.name: site.role for site in find_sites(model).found}
    foreign = [name for name in names if name not in known]
    if foreign:
        raise CheckpointError(
            f"{folder} adapts {', '.join(foreign[:3])}{' ...' if len(foreign) > 3 else ''}: only attention output "
            "and MLP down projections can be adapted without touching keys and values."
        )
    roles: dict[str, str | list[str]] = {
        role: [n for n in names if known[n] == role] for role in set(known.values())
    }
    return {role: found or ["(none)"] for role, found in roles.items()}


def _lora_pairs(
    tensors: dict[str, torch.Tensor], folder: Path
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = (
            key.removesuffix(".weight").removeprefix("base_model.model.").rpartition(".")
        )
        if kind not in ("lora_A", "lora_B"):
            raise CheckpointError(f"{folder}: {key} is not part of a plain LoRA.")
        pairs.setdefault(name, {})[kind] = tensor
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in pairs.items()}


def _pattern(patterns: dict[str, Any] | None, site: str, default: Any) -> Any:
    """PEFT's rank_pattern / alpha_pattern: keys are module names or suffixes."""
    for key, value in (patterns or {}).items():
        if site == key or site.endswith("." + key):
            return value
    return default


def _attach_tensors(model: Any, config: AdapterConfig, folder: Path, trainable: bool) -> Attached:
    from peft import set_peft_model_state_dict

    from bem.adapters.attach import attach

    attached = attach(model, config)
    result = set_peft_model_state_dict(attached.model, load_file(folder / WEIGHTS))
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


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
