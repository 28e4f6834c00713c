"""Where the queries of each attention layer come out, so that they can be scaled head by head.

A query projection may be a layer of its own, followed by a norm per head (Qwen3, Gemma 3), or one
third of a fused projection whose layout depends on the architecture. Fused layouts are listed, not
guessed: scaling a key by mistake would poison the cache. ALiBi adds positions to the logits, past the
queries, so that it is refused; a soft cap on the logits is applied after the division.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bem.adapters.sites import ATTENTION, Sites, clean_name, is_linear, linear_shape
from bem.errors import AttachError

QUERY = re.compile(r"\.(q_proj|query|wq|q_lin|q_b_proj|q)$")
QUERY_NORM = re.compile(r"\.(q_norm|query_norm|q_layernorm|query_layernorm|q_ln)$")
FUSED = re.compile(r"\.(qkv_proj|c_attn|query_key_value|Wqkv|in_proj|qkv)$")


@dataclass(frozen=True)
class Queries:
    """The module whose output holds one layer's queries, and which head each column belongs to."""

    name: str
    n_heads: int
    columns: Tensor | None
    """int (width,): query head of each output column, n_heads where it is a key or a value;
    None: the output has a dimension of heads."""
    heads_last: bool = True
    """With a dimension of heads: (batch, tokens, heads, head_dim), or (batch, heads, tokens, head_dim)."""

    def of_table(self, table: Tensor) -> Tensor:
        """A control table (rows, n_heads), one number for each column of the output (rows, width)."""
        if self.columns is None:
            return table
        ones = table.new_ones(len(table), 1)
        return torch.cat([table, ones], -1).index_select(-1, self.columns.to(table.device))

    def per_token(self, factors: Tensor, output: Tensor) -> Tensor:
        """What `of_table` made, one row per token in flattened order, shaped to multiply `output`."""
        if self.columns is not None:
            return factors.view(output.shape)
        tokens = output.shape[1] if self.heads_last else output.shape[2]
        by_token = factors.view(-1, tokens, self.n_heads)
        return by_token[..., None] if self.heads_last else by_token.transpose(1, 2)[..., None]


def find_queries(model: nn.Module, sites: Sites, layers: list[int]) -> dict[int, Queries]:
    """Block index -> where its queries come out, for each of `layers`.

    Raises:
        AttachError: a block has no query projection of a known layout.
    """
    modules = {clean_name(n): m for n, m in model.named_modules() if ".bem_" not in n}
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {layer: _of_block(modules, sites.blocks[layer], config, sites) for layer in layers}


def _of_block(modules: dict[str, nn.Module], block: str, config: Any, sites: Sites) -> Queries:
    inside = {
        n: m
        for n, m in modules.items()
        if n.startswith(block + ".") and ATTENTION.search(n[len(block) :])
    }
    heads, kind = sites.n_heads, getattr(config, "model_type", "")
    if kind in ("bloom", "mpt") or getattr(config, "alibi", False):
        raise AttachError(
            f"{kind} adds position biases (ALiBi) to the logits, which scaled queries do not reach. "
            "Use attach(model, 'v2', temperature=False), or another variant."
        )
    own = [n for n, m in inside.items() if QUERY.search(n) and is_linear(m)]
    fused = [n for n, m in inside.items() if FUSED.search(n) and is_linear(m)]
    norms = [n for n in inside if QUERY_NORM.search(n)]
    if own and norms and (size := _weights(inside[norms[0]])):
        width = linear_shape(inside[own[0]])[1]
        if size in (width, width // heads):  # a norm undoes what is scaled before it
            if size == width:
                return Queries(norms[0], heads, _plain(width, heads))
            return Queries(norms[0], heads, None, _heads_last(modules, norms[0]))
    elif own and not norms:
        return Queries(own[0], heads, _plain(linear_shape(inside[own[0]])[1], heads))
    elif fused and not norms and kind in LAYOUTS:
        width = linear_shape(inside[fused[0]])[1]
        return Queries(fused[0], heads, LAYOUTS[kind](width, heads, config))
    raise AttachError(
        f"{block}: no query projection of a layout that I know (model type {kind or '?'!r}): v2 cannot "
        "scale its heads. Use attach(model, 'v2', temperature=False), or another variant."
    )


def _weights(norm: nn.Module) -> int:
    weight = getattr(norm, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else 0


def _heads_last(modules: dict[str, nn.Module], norm: str) -> bool:
    """Does a norm per head run before heads and tokens change places? The forward pass that calls it
    says so; sizes cannot: there may be as many tokens as heads.

    Raises:
        AttachError: the source cannot be read.
    """
    parent, _, name = norm.rpartition(".")
    try:
        source = inspect.getsource(type(modules[parent]).forward)
    except (OSError, TypeError):
        source = ""
    called = source.find(f"self.{name}(")
    if called < 0:
        raise AttachError(
            f"{norm} is not called by {type(modules[parent]).__name__}.forward: whether heads come before tokens "
            "is not known. Use attach(model, 'v2', temperature=False), or another variant."
        )
    inside = source[called : _closing(source, source.index("(", called))]
    return ".transpose(1, 2)" not in source[:called] + inside


def _closing(text: str, opening: int) -> int:
    """Place of the bracket that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _plain(width: int, heads: int) -> Tensor:
    return torch.arange(heads).repeat_interleave(width // heads)


def _queries_first(width: int, heads: int, config: Any) -> Tensor:
    """[q | k | v]"""
    size = getattr(config, "head_dim", None) or _hidden(config) // heads
    columns = torch.full((width,), heads)
    columns[: heads * size] = _plain(heads * size, heads)
    return columns


def _interleaved(width: int, heads: int, config: Any) -> Tensor:
    """[q k v] of head 0, [q k v] of head 1, ..."""
    size = width // (3 * heads)
    columns = torch.full((heads, 3, size), heads)
    columns[:, 0] = torch.arange(heads)[:, None]
    return columns.flatten()


def _falcon(width: int, heads: int, config: Any) -> Tensor:
    """Grouped [q ... q k v] (new architecture), [q ... q k v] once (multi-query), or interleaved."""
    size = _hidden(config) // heads
    if getattr(config, "new_decoder_architecture", False):
        groups = config.num_kv_heads
    elif getattr(config, "multi_query", True):
        groups = 1
    else:
        return _interleaved(width, heads, config)
    columns = torch.full((groups, heads // groups + 2, size), heads)
    columns[:, :-2] = torch.arange(heads).view(groups, -1, 1)
    return columns.flatten()


def _hidden(config: Any) -> int:
    return getattr(config, "hidden_size", None) or config.n_embd


LAYOUTS: dict[str, Callable[[int, int, Any], Tensor]] = {
    "gpt2": _queries_first,
    "phi3": _queries_first,
    "gpt_neox": _interleaved,
    "falcon": _falcon,
}
"""Model type -> head of each column of its fused projection: (width, n_heads, config) -> columns."""
