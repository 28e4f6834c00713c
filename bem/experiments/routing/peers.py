"""Peers of our router: PEFT's X-LoRA and Arrow over the same experts, measured by the same code.

    peer = xlora(model, {"json": "experts/json", "sql": "experts/sql"})
    fit(peer, tokenizer, rows, training, folder)       # trains the classifier, nothing else
    measure(peer, tokenizer, tasks)
    model = peer.detach()

X-LoRA (arXiv:2402.07148) runs the base once, lets a classifier on its last hidden states weigh every
expert at every token and site, and runs again with those weights. Arrow (arXiv:2405.11157) trains
nothing: at each site and token it takes the experts whose update has its main input direction most in
line with the token.

What it took on transformers 5.24 and PEFT 0.21:
  * X-LoRA refuses a config with `use_cache=True` (both passes would write into one cache). Decoding
    reads the whole conversation twice for every token; `model(..., use_cache=True)` hands back the
    tokens read in place of a cache (`TokensRead`), so that whoever decodes step by step pays that too.
  * X-LoRA wants its experts to be called "0", "1", ...; other names fail later.
  * Arrow's `create_arrow_model` puts its router on every layer whose last name an expert has
    (all `o_proj`) and fails at the first one that no expert adapts. So we make the same calls with the
    experts' own sites. All experts need the same sites and ranks; it is dense over them for any top_k.
  * Neither knows our turn starts, evidence or routes: those arguments are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bem.adapters.budget import Price
from bem.adapters.checkpoint import file_hash
from bem.adapters.lora import WEIGHTS, Lora, read_json, read_lora
from bem.adapters.sites import base_hash
from bem.config import Section, parse
from bem.errors import AttachError, BaseMismatch, CheckpointError
from bem.experiments.measuring.answers import context_length
from bem.experiments.measuring.latency import last_logits_only
from bem.training.fit import write_atomically

OURS = ("turn_starts", "evidence", "route")
"""Arguments of forward and generate that only our own adapters read."""
ROUTER = "arrow_router"
MANIFEST, TRAINED, FORMAT = "manifest.json", "classifier.safetensors", 1
PRICED = 512
"""Tokens of the prefill that a price is counted on."""
CLASSIFIER = ".internal_xlora_classifier."
Folders = Mapping[str, str | Path]
"""Expert name -> folder of a plain PEFT LoRA."""


class PeerConfig(Section):
    """What a peer was made of."""

    kind: Literal["arrow", "xlora"]
    experts: dict[str, str]
    """Expert name -> sha256 of its weights file."""
    settings: dict[str, Any]
    """Arguments of `arrow` or `xlora`."""


@dataclass(frozen=True)
class _Base:
    """What the base was before."""

    trainable: dict[str, bool]
    use_cache: bool | None
    flops: float
    """Of a prefill of `PRICED` tokens."""


class Peer:
    """A PEFT method over several experts, as `fit`, `measure` and `measure_latency` take one.

    `model` is a `peft.PeftModel`. Build each arm on its own copy (`copies.with_shared_weights`).
    """

    def __init__(self, model: Any, config: PeerConfig, n_expert_parameters: int, base: _Base):
        self.model, self.config = model, config
        self._n_expert_parameters, self._base = n_expert_parameters, base
        model.requires_grad_(False)
        for parameter in self.parameters():
            parameter.requires_grad = True
        generate = model.generate
        model.__dict__["generate"] = lambda *args, **given: generate(*args, **_known(given))
        if config.kind == "xlora":
            _Reread(model)
        else:
            model.register_forward_pre_hook(
                lambda _, args, given: (args, _known(given)), with_kwargs=True
            )
        model.eval()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """X-LoRA's classifier; Arrow has nothing to train."""
        return [(n, p) for n, p in self.model.named_parameters() if CLASSIFIER in n]

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
        mine = self.state_dict()
        shapes = [{n: tuple(t.shape) for n, t in part.items()} for part in (mine, tensors)]
        if shapes[0] != shapes[1]:
            raise AttachError(f"the tensors {shapes[1]} do not fit this peer's {shapes[0]}.")
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])

    def penalty(self) -> Tensor:
        """Neither method has a regulariser."""
        return torch.zeros((), device=self.model.device)

    def after_step(self) -> None:
        """Nothing to keep within bounds."""

    def price(self) -> Price:
        """Parameters (experts and classifier), and matrix FLOPs per token of a prefill beyond the
        base's, counted while it runs."""
        extra = _prefill_flops(self.model) - self._base.flops
        trained = sum(p.numel() for p in self.parameters())
        return Price(self._n_expert_parameters + trained, extra / _priced(self.model), ())

    def save(self, folder: str | Path, data_hash: str = "") -> Path:
        """Write what was trained and a manifest with hashes of experts, base and data.

        The experts stay where they are: `load_peer` is told where. The manifest is written last.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.cpu().contiguous() for name, t in self.state_dict().items()}
        write_atomically(folder / TRAINED, save(tensors))
        manifest = {
            "format": FORMAT,
            "kind": "peer",
            "peer": self.config.model_dump(mode="json"),
            "base": base_hash(self.model.get_base_model()),
            "data": data_hash,
            "files": {TRAINED: file_hash(folder / TRAINED)},
        }
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
        return folder

    def detach(self) -> Any:
        """Take everything off and return the base as it was, bit for bit."""
        model = self.model.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = self._base.trainable[name]
        if self._base.use_cache is not None:
            model.config.use_cache = self._base.use_cache
        return model


def arrow(model: Any, folders: Folders, top_k: int = 1, temperature: float = 1.0) -> Peer:
    """Arrow over experts: nothing to train.

    Args:
        model: the base that the experts were made for.
        folders: at least two plain PEFT LoRAs with the same sites and ranks.
        top_k: experts that act on a token at a site.
        temperature: of the softmax over their scores.
    Raises:
        AttachError: too few experts, other sites or ranks, or an impossible top_k.
        CheckpointError: a folder holds no plain LoRA, or one for another base.
    """
    from peft import ArrowConfig, LoraConfig, PeftModel

    experts = _read(model, folders)
    ranks = [{site: len(lora.a) for site, lora in expert.items()} for expert in experts.values()]
    for name, found in zip(experts, ranks, strict=True):
        if found != ranks[0]:
            raise AttachError(
                f"Arrow needs experts of the same sites and ranks: {next(iter(experts))} and {name} differ. "
                "Train them with one config."
            )
    if not 1 <= top_k <= len(experts):
        raise AttachError(f"top_k {top_k} of {len(experts)} experts is impossible.")
    base = _base_of(model)
    names = [f"task_{i}" for i in range(len(experts))]
    first, *others = [str(folder) for folder in folders.values()]
    settings = {"top_k": top_k, "temperature": temperature}
    # the seed is of the power iteration that finds each expert's direction
    method = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    method.task_adapter_names, method.gks_adapter_names = names, []
    sites = sorted(ranks[0])
    router = LoraConfig(arrow_config=method, target_modules=sites, r=max(ranks[0].values()))
    with _seeded(model, 0):  # PEFT draws weights before it loads ours
        wrapped = PeftModel.from_pretrained(model, first, adapter_name=names[0])
        for name, folder in zip(names[1:], others, strict=True):
            wrapped.load_adapter(folder, adapter_name=name)
        wrapped.add_adapter(ROUTER, router)
    wrapped.set_adapter(ROUTER)
    peer = Peer(wrapped, _config("arrow", folders, settings), _count(experts), base)
    _prefill_flops(wrapped)  # finds the directions now, so that no request or price pays for it
    return peer


def xlora(
    model: Any,
    folders: Folders,
    depth: int = 1,
    layerwise: bool = True,
    top_k: int | None = None,
    seed: int = 0,
) -> Peer:
    """X-LoRA over experts; its classifier is trained by `bem.training.fit.fit`.

    Args:
        model: the base that the experts were made for.
        folders: at least two plain PEFT LoRAs.
        depth: linear layers of the classifier.
        layerwise: weights of their own at every site (as in the paper), or one set for all.
        top_k: keep the largest weights only; None: all.
        seed: of the classifier's initial weights.
    Raises:
        AttachError: too few experts, or an impossible top_k.
        CheckpointError: a folder holds no plain LoRA, or one for another base.
    """
    from peft import XLoraConfig, get_peft_model

    experts = _read(model, folders)
    if top_k is not None and not 1 <= top_k <= len(experts):
        raise AttachError(f"top_k {top_k} of {len(experts)} experts is impossible.")
    base = _base_of(model)
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        adapters={str(i): str(folder) for i, folder in enumerate(folders.values())},
        xlora_depth=depth,
        layerwise_scalings=layerwise,
        top_k_lora=top_k,
    )
    model.config.use_cache = False
    with _seeded(model, seed):
        wrapped = get_peft_model(model, config)
    settings = {"depth": depth, "layerwise": layerwise, "top_k": top_k, "seed": seed}
    return Peer(wrapped, _config("xlora", folders, settings), _count(experts), base)


MAKERS = {"arrow": arrow, "xlora": xlora}


def load_peer(model: Any, folder: str | Path, experts: str | Path) -> Peer:
    """What `Peer.save` wrote, with its experts from `experts`/NAME.

    Raises:
        CheckpointError: no peer, a file missing or changed since, an expert that is another one now.
        BaseMismatch: made for another base.
    """
    folder, experts = Path(folder), Path(experts)
    manifest = read_json(folder / MANIFEST)
    if manifest.get("kind") != "peer":
        raise CheckpointError(f"{folder} holds no X-LoRA and no Arrow that `Peer.save` wrote.")
    if (found := base_hash(model)) != manifest["base"]:
        raise BaseMismatch(
            f"{folder} was made for a base with hash {manifest['base'][:12]}, this one has {found[:12]}."
        )
    config = parse(PeerConfig, manifest["peer"], str(folder))
    folders = {name: experts / name for name in config.experts}
    files = {folders[name] / WEIGHTS: digest for name, digest in config.experts.items()}
    for file, digest in {**files, folder / TRAINED: manifest["files"][TRAINED]}.items():
        if not file.is_file() or file_hash(file) != digest:
            raise CheckpointError(f"{file} is missing, or was changed since {folder} was saved.")
    peer = MAKERS[config.kind](model, folders, **config.settings)
    peer.load_state_dict(load_file(folder / TRAINED))
    return peer


@contextmanager
def _seeded(model: Any, seed: int) -> Iterator[None]:
    """Random numbers of `seed` inside; nobody else's are used up."""
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class TokensRead:
    """Stands where a cache would: the tokens of the conversation so far, to be read again."""

    ids: Tensor  # (batch, tokens)


class _Reread:
    """Hooks that let a model without a cache be called as if it had one: it reads all again."""

    def __init__(self, model: Any):
        self.ids: Tensor | None = None
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after)

    def before(self, module: Any, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict]:
        given = _known(given)
        read = given.pop("past_key_values", None)
        keep = given.pop("use_cache", False)
        if isinstance(read, TokensRead):
            given.setdefault("logits_to_keep", given["input_ids"].shape[1])
            given["input_ids"] = torch.cat([read.ids, given["input_ids"]], 1)
            given.pop("position_ids", None)  # were those of the new tokens alone
        self.ids = given["input_ids"] if keep else None
        return args, {**given, "use_cache": False}

    def after(self, module: Any, args: tuple, output: Any) -> Any:
        if self.ids is not None:
            output.past_key_values = TokensRead(self.ids)
        return output


def _known(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in OURS}


def _read(model: Any, folders: Folders) -> dict[str, dict[str, Lora]]:
    """Sites and factors of every expert, checked against the base."""
    if len(folders) < 2:
        raise AttachError(f"routing needs at least two experts, got {len(folders)}.")
    if getattr(model, "peft_config", None):
        raise AttachError("the model already carries an adapter: detach it first.")
    return {name: read_lora(model, Path(folder)) for name, folder in folders.items()}


def _base_of(model: Any) -> _Base:
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    return _Base(trainable, getattr(model.config, "use_cache", None), _prefill_flops(model))


def _config(kind: Literal["arrow", "xlora"], folders: Folders, settings: Any) -> PeerConfig:
    hashes = {name: file_hash(Path(folder) / WEIGHTS) for name, folder in folders.items()}
    return PeerConfig(kind=kind, experts=hashes, settings=settings)


def _count(experts: Mapping[str, Mapping[str, Lora]]) -> int:
    return sum(x.a.numel() + x.b.numel() for expert in experts.values() for x in expert.values())


def _priced(model: Any) -> int:
    return min(PRICED, context_length(model))


@torch.no_grad()
def _prefill_flops(model: Any) -> float:
    ids = torch.zeros((1, _priced(model)), dtype=torch.long, device=model.device)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, **last_logits_only(model), use_cache=False)
    return float(counter.get_total_flops())
