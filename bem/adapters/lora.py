"""Plain PEFT LoRA files: the one reader and the one writer.

PEFT's LoRA is delta W = scale * B A with lora_A = A (rank, d_in), lora_B = B (d_out, rank), and
scale = alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732). Any other feature is
rejected: dropping it would change the update.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bem.adapters.names import clean_name
from bem.adapters.sites import find_linears, find_sites
from bem.errors import CheckpointError
from bem.files import read_json as _read_json
from bem.files import write_bytes, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# what a config may switch on -> why it cannot be read as a static low-rank update
REFUSED = {
    "use_dora": "DoRA rescales the whole weight",
    "lora_bias": "a bias is no low-rank update",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it changes embeddings",
    "target_parameters": "it adapts bare parameters, not linear layers",
    "layer_replication": "it changes the number of layers",
    "alora_invocation_tokens": "aLoRA acts only behind its invocation tokens",
    "use_qalora": "QALoRA pools its input",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "Arrow routes between several LoRAs",
    "kasa_config": "KaSA adds singular values of its own",
    "monteclora_config": "MonteCLoRA samples its factors",
}
# PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA also change the weight they start from
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Update:
    """One site's low-rank update: delta W = u @ v, the LoRA scale folded into u."""

    u: Float[Tensor, "out rank"]
    v: Float[Tensor, "rank in"]


@dataclass(frozen=True)
class Lora:
    """One site's LoRA as the file holds it: delta W = scale * b @ a."""

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    scale: float

    def update(self) -> Update:
        """The same in float32, the scale folded in."""
        return Update(self.b.float() * self.scale, self.a.float())


def read_lora(
    model: Any,
    folder: Path,
    overrides: dict[str, str | list[str]] | None = None,
    anywhere: bool = False,
) -> dict[str, Lora]:
    """Every adapted site of a PEFT LoRA folder.

    Args:
        model: the base; its sites and their shapes are checked. PEFT writes no hash of the base, so
            that a LoRA made for other weights of the same shape cannot be told.
        folder: holds adapter_config.json and adapter_model.safetensors.
        overrides: of the site search, see `find_sites`.
        anywhere: on any linear layer of the decoder blocks, not on W_O and W_down alone.
    Raises:
        CheckpointError: not a plain LoRA, on other layers, shapes that do not fit, NaN or inf.
    """
    config = read_json(folder / CONFIG)
    _refuse_other_features(config, folder)
    loras = {}
    for site, (a, b) in _pairs(read_tensors(folder), folder).items():
        rank = _pattern(config.get("rank_pattern"), site, config["r"])
        alpha = _pattern(config.get("alpha_pattern"), site, config["lora_alpha"])
        if not len(a) == b.shape[-1] == rank:
            raise CheckpointError(
                f"{folder}: {site} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, the config says rank {rank}."
            )
        loras[site] = Lora(a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank))
    shapes = {site: (len(x.b), x.a.shape[1]) for site, x in loras.items()}
    check_sites(model, shapes, str(folder), overrides, anywhere)
    for site, lora in loras.items():
        check_finite(Update(lora.b, lora.a), f"{folder}: {site}")
    return loras


def write_loras(loras: Mapping[str, Lora], folder: Path, base_name: str | None = None) -> Path:
    """Write what PEFT would write: one rank and alpha for all, patterns where a site differs."""
    if not loras:
        raise CheckpointError(f"{folder}: there is no update to write, every site is empty.")
    tensors, ranks, alphas = {}, {}, {}
    for site, lora in sorted(loras.items()):
        tensors[f"base_model.model.{site}.lora_A.weight"] = _plain(lora.a)
        tensors[f"base_model.model.{site}.lora_B.weight"] = _plain(lora.b)
        ranks[site] = len(lora.a)
        alphas[site] = alpha_of(lora.scale, len(lora.a))
    first = max(ranks, key=ranks.__getitem__)  # servers size their buffers by r
    # "^": PEFT reads the keys of patterns as regular expressions over the end of a name
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        r=ranks[first],
        lora_alpha=alphas[first],  # type: ignore[arg-type]
        rank_pattern={f"^{s}": r for s, r in ranks.items() if r != ranks[first]},
        alpha_pattern={f"^{s}": a for s, a in alphas.items() if a != alphas[first]},  # type: ignore[misc]
        target_modules=sorted(ranks),
        lora_dropout=0.0,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    written = read_json(folder / CONFIG)  # PEFT holds a set: in each process in another order
    write_json(folder / CONFIG, {**written, "target_modules": sorted(ranks)}, indent=2)
    write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    return folder


def missed_by_peft(model: nn.Module, sites: Iterable[str]) -> str:
    """Why PEFT itself would not read a LoRA on these layers as it is, in a few words; empty: it would.

    It takes some names for experts that are fused by now, gives others another name, and refuses some
    layers of state space models. It is asked on a skeleton that has these layers alone, one number wide.
    """
    wanted = sorted(set(sites))
    keys = [f"base_model.model.{site}.lora_{half}.weight" for site in wanted for half in "AB"]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="target_parameters=")  # what this asks about
            theirs = get_peft_model(
                _skeleton(model, wanted), LoraConfig(r=1, target_modules=wanted)
            )
        set_peft_model_state_dict(theirs, {key: torch.full((1, 1), 7.0) for key in keys})
    except Exception as error:  # foreign code: whatever it raises, it would raise on the model too
        return f"PEFT puts no LoRA there: {str(error).split('. ')[0]}"
    read = {
        clean_name(n).split(".lora_")[0] for n, p in theirs.named_parameters() if (p == 7).all()
    }
    missed = [site for site in wanted if f"base_model.model.{site}" not in read]
    return f"PEFT puts no LoRA onto {_few(missed)}, but elsewhere or nowhere" if missed else ""


def _skeleton(model: Any, sites: Iterable[str]) -> Any:
    """A model of that class and config with these layers alone, under their names, one number wide."""
    of_model: Any = type(model)
    skeleton = of_model.__new__(of_model)
    nn.Module.__init__(skeleton)
    skeleton.config = getattr(model, "config", {"model_type": "custom"})
    skeleton.get_input_embeddings = nn.Module  # PEFT looks for what is tied to them: there are none
    for site in sites:
        parent, (*path, last) = skeleton, site.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, nn.Linear(1, 1))
    return skeleton


def alpha_of(scale: float, rank: int) -> float:
    """LoRA's alpha: the number for which alpha / rank is `scale` to the last bit, where there is one."""
    alpha = scale * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in near if a / rank == scale), alpha)


def write_lora(
    updates: dict[str, Update], folder: str | Path, base_name: str | None = None
) -> Path:
    """Write updates as a plain PEFT LoRA (alpha = rank, so that its scale is 1).

    Args:
        updates: site name -> update.
        folder: made if missing.
        base_name: what PEFT looks up as the base, a hub id or a folder.
    Raises:
        CheckpointError: there is nothing to write.
    """
    loras = {site: Lora(update.v, update.u, 1.0) for site, update in updates.items()}
    return write_loras(loras, Path(folder), base_name)


def check_sites(
    model: Any,
    shapes: dict[str, tuple[int, int]],
    where: str,
    overrides: Any = None,
    anywhere: bool = False,
) -> None:
    """Are these layers of the model that may be adapted, with these (d_out, d_in)?

    Args:
        anywhere: see `read_lora`.
    Raises:
        CheckpointError: names the layers that may not, or whose shape is another.
    """
    sites = find_linears(model) if anywhere else find_sites(model, overrides)
    of_model = {site.name: (site.d_out, site.d_in) for site in sites.found}
    if foreign := sorted(shapes.keys() - of_model.keys()):
        modules = dict(model.named_modules())
        absent = [name for name in foreign if name not in modules]
        if len(absent) == len(foreign):
            raise CheckpointError(
                f"{where} adapts {_few(foreign)}, which {type(model).__name__} does not have: made for another "
                "architecture or size."
            )
        raise CheckpointError(f"{where} adapts {_few(foreign)}: {_why_not(of_model, anywhere)}")
    for site, shape in shapes.items():
        if shape != of_model[site]:
            raise CheckpointError(
                f"{where}: {site} is {of_model[site]} (out, in) in this model, the update {shape}: made for another base."
            )


def _why_not(of_model: dict[str, tuple[int, int]], anywhere: bool) -> str:
    targets = f"Train it with target_modules={_targets(of_model)}"
    if anywhere:
        return (
            "an expert acts on linear layers of the decoder blocks through which every token passes. "
            f"{targets}, or fewer of them."
        )
    return (
        "s0 acts on attention output and MLP down projections. A LoRA on other layers can be mounted as an "
        f"expert (bem.mount). {targets}."
    )


def check_finite(update: Update, where: str) -> None:
    """CheckpointError if a factor holds NaN or inf."""
    bad = int(sum((~torch.isfinite(t)).sum() for t in (update.u, update.v)))
    if bad:
        raise CheckpointError(
            f"{where} holds {bad} NaN or infinite weights: its training diverged."
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if it is missing, broken or no object."""
    values = _read_json(path, CheckpointError)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, not a JSON object.")
    return values


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder; CheckpointError if there are none in safetensors."""
    if not (folder / WEIGHTS).is_file():
        pickled = " adapter_model.bin is a pickle, which can run code: save it as safetensors."
        raise CheckpointError(
            f"{folder} holds no {WEIGHTS}.{pickled if (folder / 'adapter_model.bin').is_file() else ''}"
        )
    try:
        return load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is no safetensors file: {error}.") from None


def _refuse_other_features(config: dict[str, Any], folder: Path) -> None:
    for flag, reason in REFUSED.items():
        if config.get(flag):
            raise CheckpointError(
                f"{folder}: {flag} is not a plain low-rank update ({reason}); only LoRA and rsLoRA are read."
            )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{folder}: bias={config['bias']!r} trains biases of the base itself."
        )
    if (start := config.get("init_lora_weights", True)) not in PLAIN_STARTS:
        raise CheckpointError(
            f"{folder}: init_lora_weights={start!r} also changes the weights of the base. Save it as a plain LoRA: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if missing := [key for key in ("r", "lora_alpha") if key not in config]:
        raise CheckpointError(f"{folder}: {CONFIG} names no {' and no '.join(missing)}.")


def _pairs(tensors: dict[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = (
            key.removesuffix(".weight").removeprefix("base_model.model.").rpartition(".")
        )
        if kind not in ("lora_A", "lora_B"):
            head = "lm_head" in key or "embed" in key
            hint = (
                " Train it without output head and embeddings among target_modules." if head else ""
            )
            raise CheckpointError(f"{folder}: {key} is not part of a plain LoRA.{hint}")
        factors.setdefault(name, {})[kind] = tensor
    for name, pair in factors.items():
        if len(pair) != 2:
            raise CheckpointError(f"{folder}: {name} has {next(iter(pair))} alone.")
    if not factors:
        raise CheckpointError(f"{folder}: {WEIGHTS} holds no LoRA.")
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in factors.items()}


def _pattern(patterns: dict[str, Any] | None, site: str, default: Any) -> Any:
    """PEFT's rank_pattern / alpha_pattern: keys are regular expressions over the end of a name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", site):
            return value
    return default


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' ... ({len(names)} layers)' if len(names) > 3 else ''}"


def _targets(names: Any) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})
