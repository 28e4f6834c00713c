"""A method of PEFT's over the same experts as our router, measured by the same code.

    peer = xlora(model, {"json": "experts/json", "sql": "experts/sql"})
    fit(peer, tokenizer, rows, training, folder)       # trains the classifier, nothing else
    measure(peer, tokenizer, tasks)
    model = peer.detach()

No such method knows our turn starts, evidence or routes: those arguments are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bem.adapters.budget import Price
from bem.adapters.lora import WEIGHTS, Lora, read_lora
from bem.adapters.version import base_digest
from bem.config import Section, parse
from bem.errors import AttachError, BaseMismatch, CheckpointError
from bem.experiments.measuring.answers import context_length
from bem.experiments.measuring.latency import last_logits_only
from bem.files import check_listed, read_json, sha256_file, write_bytes

OURS = ("turn_starts", "evidence", "vision", "route")
"""Arguments of forward and generate that only our own adapters read."""
MANIFEST, TRAINED, FORMAT = "manifest.json", "classifier.safetensors", 1
PRICED = 512
"""Tokens of the prefill that a price is counted on."""
Folders = Mapping[str, str | Path]
"""Expert name -> folder of a plain PEFT LoRA."""


class PeerConfig(Section):
    """What a peer was made of."""

    kind: Literal["arrow", "xlora"]
    experts: dict[str, str]
    """Expert name -> sha256 of its weights file."""
    settings: dict[str, Any]
    """Arguments of the function that made it."""


@dataclass(frozen=True)
class BareBase:
    """What a base was before anything was put on it."""

    trainable: dict[str, bool]
    use_cache: bool | None
    flops: float
    """Of a prefill of `PRICED` tokens."""


class Peer:
    """A PEFT method over several experts, as `fit`, `measure` and `measure_latency` take one.

    `model` is a `peft.PeftModel`. Build each arm on its own copy (`copies.with_shared_weights`).
    """

    def __init__(
        self,
        model: Any,
        config: PeerConfig,
        n_expert_parameters: int,
        base: BareBase,
        trained: str = "",
    ):
        """
        Args:
            model: with the experts and whatever chooses between them.
            n_expert_parameters: of all experts together.
            base: what the base was before.
            trained: part of the names of what trains; "": nothing does.
        """
        self.model, self.config = model, config
        self._n_expert_parameters, self._base, self._trained = n_expert_parameters, base, trained
        model.requires_grad_(False)
        for parameter in self.parameters():
            parameter.requires_grad = True
        generate = model.generate
        model.__dict__["generate"] = lambda *args, **given: generate(*args, **without_ours(given))
        model.eval()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What trains."""
        if not self._trained:
            return []
        return [(n, p) for n, p in self.model.named_parameters() if self._trained in n]

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """What was trained, detached; the experts stay in their folders."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors as `state_dict` names them.

        Raises:
            AttachError: a tensor is missing, unknown or of another shape.
        """
        own = self.state_dict()
        shapes = [{n: tuple(t.shape) for n, t in part.items()} for part in (own, tensors)]
        if shapes[0] != shapes[1]:
            raise AttachError(f"the tensors {shapes[1]} do not fit this peer's {shapes[0]}.")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def penalty(self) -> Tensor:
        """No such method has a regulariser."""
        return torch.zeros((), device=self.model.device)

    def after_step(self) -> None:
        """Nothing to keep within bounds."""

    def price(self) -> Price:
        """Parameters (experts and what is trained), and matrix FLOPs per token of a prefill beyond
        the base's, counted while it runs."""
        extra = prefill_flops(self.model) - self._base.flops
        trained = sum(p.numel() for p in self.parameters())
        return Price(self._n_expert_parameters + trained, extra / _priced(self.model), ())

    def save(self, folder: str | Path, data_hash: str = "") -> Path:
        """Write what was trained and a manifest with hashes of experts, base and data.

        The experts stay where they are: `load_peer` is told where. The manifest is written last.
        """
        folder = Path(folder)
        tensors = {name: t.cpu().contiguous() for name, t in self.state_dict().items()}
        write_bytes(folder / TRAINED, save(tensors))
        manifest = {
            "format": FORMAT,
            "kind": "peer",
            "peer": self.config.model_dump(mode="json"),
            "base": base_digest(self.model.get_base_model()),
            "data": data_hash,
            "files": {TRAINED: sha256_file(folder / TRAINED)},
        }
        write_bytes(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
        return folder

    def detach(self) -> Any:
        """Take everything off and return the base as it was, bit for bit."""
        model = self.model.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = self._base.trainable[name]
        if self._base.use_cache is not None:
            model.config.use_cache = self._base.use_cache
        return model


def load_peer(
    model: Any, folder: str | Path, experts: str | Path, makers: Mapping[str, Callable[..., Peer]]
) -> Peer:
    """What `Peer.save` wrote, with its experts from `experts`/NAME.

    Args:
        makers: the function that makes each kind.
    Raises:
        CheckpointError: no peer, a file missing or changed since, an expert that is another one now.
        BaseMismatch: made for another base.
    """
    folder, experts = Path(folder), Path(experts)
    manifest = read_json(folder / MANIFEST, CheckpointError)
    if manifest.get("kind") != "peer":
        raise CheckpointError(f"{folder} holds no X-LoRA and no Arrow that `Peer.save` wrote.")
    if (actual := base_digest(model)) != manifest["base"]:
        raise BaseMismatch(
            f"{folder} was made for a base with hash {manifest['base'][:12]}, this one has {actual[:12]}."
        )
    config = parse(PeerConfig, manifest["peer"], str(folder))
    check_listed(folder, manifest.get("files"), CheckpointError)
    for name, digest in config.experts.items():
        check_listed(experts / name, {WEIGHTS: digest}, CheckpointError)
    folders = {name: experts / name for name in config.experts}
    peer = makers[config.kind](model, folders, **config.settings)
    peer.load_state_dict(load_file(folder / TRAINED))
    return peer


# ------------------------------------------------------------------------ what both methods share


def without_ours(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward pass that PEFT's methods know."""
    return {name: value for name, value in given.items() if name not in OURS}


def read_experts(model: Any, folders: Folders, top_k: int | None) -> dict[str, dict[str, Lora]]:
    """Sites and factors of every expert, checked against the base.

    Raises:
        AttachError: too few experts, an impossible top_k, or the model carries an adapter.
        CheckpointError: a folder holds no plain LoRA, or one for another base.
    """
    if len(folders) < 2:
        raise AttachError(f"routing needs at least two experts, got {len(folders)}.")
    if getattr(model, "peft_config", None):
        raise AttachError("the model already carries an adapter: detach it first.")
    if top_k is not None and not 1 <= top_k <= len(folders):
        raise AttachError(f"top_k {top_k} of {len(folders)} experts is impossible.")
    return {name: read_lora(model, Path(folder)) for name, folder in folders.items()}


def bare(model: Any) -> BareBase:
    """What has to be given back."""
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    return BareBase(trainable, getattr(model.config, "use_cache", None), prefill_flops(model))


def peer_config(kind: Literal["arrow", "xlora"], folders: Folders, settings: Any) -> PeerConfig:
    """The record of what a peer is made of."""
    hashes = {name: sha256_file(Path(folder) / WEIGHTS) for name, folder in folders.items()}
    return PeerConfig(kind=kind, experts=hashes, settings=settings)


def count(experts: Mapping[str, Mapping[str, Lora]]) -> int:
    """Parameters of all experts."""
    return sum(x.a.numel() + x.b.numel() for expert in experts.values() for x in expert.values())


@contextmanager
def seeded(model: Any, seed: int) -> Iterator[None]:
    """Random numbers of `seed` inside; nobody else's are used up."""
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _priced(model: Any) -> int:
    return min(PRICED, context_length(model))


@torch.no_grad()
def prefill_flops(model: Any) -> float:
    """Matrix FLOPs of a prefill of `PRICED` tokens, counted while it runs."""
    ids = torch.zeros((1, _priced(model)), dtype=torch.long, device=model.device)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, **last_logits_only(model), use_cache=False)
    return float(counter.get_total_flops())
