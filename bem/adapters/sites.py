"""Where a module may be attached: found by structure and name in any causal language model.

What we train ourselves acts on two sites per decoder block, the attention output projection (W_O) and
the MLP down projection (W_down): few and cheap, and what is cached for the base below them stays the
base's own. Experts that others have trained act wherever they were trained to, on any linear layer
of the blocks: a chunk's control is never revised, so its keys and values stay what they were, and its
key says what was applied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from bem.adapters.names import clean_name
from bem.errors import AttachError

ATTN_OUT, MLP_DOWN, OTHER = "attn_out", "mlp_down", "other"
ATTN_OUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo", "out")
MLP_DOWN_NAMES = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2", "wo", "lin2")
TOWER = re.compile(r"vision|visual|image|audio|speech", re.IGNORECASE)
CROSS = re.compile(r"cross|encoder_attn", re.IGNORECASE)
"""Attention to another sequence, if there is one."""
BESIDE = re.compile(r"layernorm|\.(gate|router\w*)\.", re.IGNORECASE)
"""A norm, or what chooses experts: may have a small MLP of its own."""
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
FORBIDDEN = re.compile(
    r"(^|\.)(q|k|v|qk|kv|qkv|query|key|value|query_key_value|w_?qkv|q_proj|k_proj|v_proj|qkv_proj"
    r"|wq|wk|wv|c_attn|in_proj)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Site:
    """One linear layer that may be adapted."""

    name: str  # full module name
    layer: int  # index of its decoder block
    role: str  # ATTN_OUT, MLP_DOWN or OTHER
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Sites:
    """All sites of a model, and the sizes that adapters need."""

    blocks: tuple[str, ...]  # module names of the decoder blocks, bottom to top
    found: tuple[Site, ...]
    d_model: int
    n_heads: int

    def above(self, layer: int) -> list[Site]:
        """The sites of block `layer` and all blocks above it."""
        return [site for site in self.found if site.layer >= layer]

    def at(self, layer: int, role: str) -> Site | None:
        """The site of one block with one role, if there is one."""
        return next((s for s in self.found if s.layer == layer and s.role == role), None)

    def router_layer(self, wanted: int | None) -> int:
        """The block whose input the controller reads; None: a quarter of the way up."""
        layer = len(self.blocks) // 4 if wanted is None else wanted
        if not 0 <= layer < len(self.blocks):
            raise AttachError(f"router_layer {layer} must lie in 0..{len(self.blocks) - 1}.")
        return layer


def find_sites(model: nn.Module, overrides: dict[str, str | list[str]] | None = None) -> Sites:
    """Find the decoder blocks and both sites in each.

    Args:
        model: a Hugging Face causal LM.
        overrides: {'attn_out': pattern(s), 'mlp_down': pattern(s)}; a pattern is a glob or, with a
            leading 're:', a regular expression over full module names.
    Raises:
        AttachError: no blocks or no site found, an unknown role, or a q/k/v projection was named.
    """
    modules = {clean_name(n): m for n, m in model.named_modules() if ".bem_" not in n}
    blocks = _blocks(model)
    for role in overrides or {}:
        if role not in (ATTN_OUT, MLP_DOWN):
            raise AttachError(f"Unknown site role {role!r}: use {ATTN_OUT!r} or {MLP_DOWN!r}.")
    found: list[Site] = []
    for index, block in enumerate(blocks):
        inside = {n: m for n, m in modules.items() if n.startswith(block + ".") and is_linear(m)}
        if reads_another(block, inside):
            continue
        for role in (ATTN_OUT, MLP_DOWN):
            patterns = (overrides or {}).get(role)
            name = _named(inside, patterns) if patterns else _recognised(model, block, inside, role)
            if name:
                d_in, d_out = linear_shape(inside[name])
                found.append(Site(name, index, role, d_in, d_out))
    if not found:
        raise AttachError(
            f"{type(model).__name__} has no attention output or MLP down projection I recognise. Name them: "
            "attach(model, ..., sites={'attn_out': 'model.layers.*.attn.proj', 'mlp_down': '...'})."
        )
    config = _text_config(model)
    d_model = next((s.d_out for s in found), 0)
    n_heads = _first(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    return Sites(tuple(blocks), tuple(found), d_model, n_heads or 1)


def find_linears(model: nn.Module) -> Sites:
    """Every linear layer of the decoder blocks through which each token passes once: where an expert may
    act. Left out: attention to another sequence, and experts of the base, which see a part of the tokens.

    Raises:
        AttachError: see `find_sites`.
    """
    sites = find_sites(model)
    roles = {site.name: site.role for site in sites.found}
    modules = {clean_name(n): m for n, m in model.named_modules() if ".bem_" not in n}
    found: list[Site] = []
    for index, block in enumerate(sites.blocks):
        inside = {n: m for n, m in modules.items() if n.startswith(block + ".") and is_linear(m)}
        if reads_another(block, inside):
            continue
        for name, module in inside.items():
            if not CROSS.search(name[len(block) :]) and not _one_of_many(name, block, modules):
                found.append(Site(name, index, roles.get(name, OTHER), *linear_shape(module)))
    return replace(sites, found=tuple(found))


def _one_of_many(name: str, block: str, modules: dict[str, nn.Module]) -> bool:
    """Does a module lie in a list of modules inside its block: one of the base's experts?"""
    above = name
    while len(above := above.rpartition(".")[0]) > len(block):
        if isinstance(modules[above], nn.ModuleList):
            return True
    return False


def reads_another(block: str, inside: Iterable[str]) -> bool:
    """Does a block attend to another sequence alone? Without one, it is not run."""
    attention = [n for n in inside if ATTENTION.search(n[len(block) :])]
    return bool(attention) and all(CROSS.search(n[len(block) :]) for n in attention)


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its kin (quantised ones too), or the transposed Conv1D of GPT-2."""
    return (hasattr(module, "in_features") and hasattr(module, "out_features")) or hasattr(
        module, "nf"
    )


def linear_shape(module: Any) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer."""
    if hasattr(module, "nf"):  # transformers' Conv1D keeps its weight as (in, out)
        return module.weight.shape[0], module.nf
    return module.in_features, module.out_features


def _blocks(model: nn.Module) -> list[str]:
    """Names of the decoder blocks: the module list as long as the config says, else the longest; one that
    reads images or sound only if there is no other."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and any(map(is_linear, module[0].modules()))
    ]
    if not lists:
        raise AttachError(f"{type(model).__name__} has no list of decoder blocks: not a causal LM?")
    depth = _first(_text_config(model), "num_hidden_layers", "n_layer", "num_layers", "n_layers")

    def fits(item: tuple[str, nn.ModuleList]) -> tuple[bool, bool, int, int]:
        name, blocks = item
        return not TOWER.search(name), len(blocks) == depth, len(blocks), -name.count(".")

    name, chosen = max(lists, key=fits)
    return [f"{name}.{i}" for i in range(len(chosen))]


def _named(inside: dict[str, nn.Module], patterns: str | list[str]) -> str | None:
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        regex = re.compile(pattern[3:]) if pattern.startswith("re:") else None
        for name in inside:
            if regex.fullmatch(name) if regex else fnmatchcase(name, pattern):
                if FORBIDDEN.search(name):
                    raise AttachError(
                        f"{name} is a query, key or value projection: an adapter there would make cached "
                        "keys and values depend on later decisions. Use attention output or MLP down."
                    )
                return name
    return None


def _recognised(
    model: nn.Module, block: str, inside: dict[str, nn.Module], role: str
) -> str | None:
    """The site by the usual names, else by structure: the last layer that writes the residual stream."""
    usual = ATTN_OUT_NAMES if role == ATTN_OUT else MLP_DOWN_NAMES
    mine = {
        name: module
        for name, module in inside.items()
        if bool(ATTENTION.search(name[len(block) :])) == (role == ATTN_OUT)
        and not FORBIDDEN.search(name)
        and not CROSS.search(name[len(block) :])
        and not BESIDE.search(name[len(block) :])
    }
    by_name = [name for name in mine if name.rsplit(".", 1)[-1] in usual]
    if len(by_name) > 1:
        raise AttachError(
            f"{block} has several candidates for {role}: {', '.join(by_name)} (a mixture of experts?). "
            f"Name one: attach(model, ..., sites={{{role!r}: '{by_name[0].replace(block, block[:-1] + '*')}'}})."
        )
    if by_name:
        return by_name[0]
    width = _first(_text_config(model), "hidden_size", "n_embd", "d_model")
    writers = [name for name, module in mine.items() if linear_shape(module)[1] == width]
    return writers[-1] if writers else None


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _first(config: Any, *names: str) -> int | None:
    return next((v for n in names if isinstance(v := getattr(config, n, None), int)), None)
