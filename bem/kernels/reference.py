"""The updates of all variants in plain torch: one layout, one definition.

    masked_low_rank    y + U (c * (V x))          c: one row of a table for each token
    few_grouped        the same of few tokens, V by groups
    kronecker          y + s * sum_t (A_t (x) B_t) x

A rank mask is a k-hot c; a head-group gate is a block of c whose rows of V see that group's inputs
alone; experts are their ranks side by side and their gates blocks of c; a strength is a factor on c.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

FEW_ROWS = 32
"""Up to so many rows `few_grouped` is the faster order (benchmarks/results/grouped.md)."""


def masked_low_rank(
    y: Float[Tensor, "*tokens out"],
    x: Float[Tensor, "*tokens in"],
    v: Float[Tensor, "rank in"] | Float[Tensor, "groups ranks part"],
    c: Float[Tensor, "rows rank"] | float,
    slot: Int[Tensor, " n"] | None,
    u: Float[Tensor, "out rank"],
) -> Float[Tensor, "*tokens out"]:
    """y + U (c[slot] * (V x)) for every token.

    Args:
        y: output of the frozen layer.
        x: its input, in the dtype of v, c and u.
        v: (R, in), or (G, R / G, in / G): the ranks of group g see the g-th slice of x alone.
        c: control table; a token is governed by one row of it. A number: the same for all.
        slot: row of c of each token, tokens counted in flattened order (n); None: c has one row, which
            holds for all tokens, or one row per token.
        u: (out, R).
    """
    if (
        not x.is_contiguous()
    ):  # torch would fold its rows or not by whether v trains: another last bit
        x = x.contiguous()
    h = F.linear(x, v) if v.dim() == 2 else _grouped(x, v)
    if not isinstance(c, Tensor):
        return torch.add(y, F.linear(h, u), alpha=c)
    rows = c if slot is None else c.index_select(0, slot)
    h = h * (rows if len(rows) == 1 else rows.view(h.shape))
    return y + F.linear(h.to(u.dtype), u)  # a residual stream in float32 makes a float32 table


def few_grouped(
    y: Float[Tensor, "rows 1 out"],
    x: Float[Tensor, "rows 1 in"],
    v: Float[Tensor, "groups part ranks"],
    c: Float[Tensor, "rows rank"],
    u: Float[Tensor, "out rank"],
) -> Float[Tensor, "rows 1 out"]:
    """`masked_low_rank` of one decoded token per row, in the order that is faster for few of them.

    X_g V_g^T is as fast as one matrix with zeros if c is multiplied where the groups lie, so that the
    product is not copied into its place beforehand.

    Args:
        v: V_g^T of every group, a view of V: for each decoded token a view costs as much as a product.
    """
    groups, part, ranks = v.shape
    rows = len(c)
    if rows == 1:  # every group's slice is a row as it lies
        h = torch.bmm(x.reshape(groups, 1, part), v).view(1, -1) * c
        return F.linear(h, u) + y
    h = torch.bmm(x.reshape(rows, groups, part).transpose(0, 1), v).transpose(0, 1)
    h = (c.view(rows, groups, ranks) * h).reshape(rows, -1)
    return F.linear(h, u).unsqueeze(1) + y


def _grouped(
    x: Float[Tensor, "*tokens in"], v: Float[Tensor, "groups ranks part"]
) -> Float[Tensor, "*tokens rank"]:
    """V_g x_g of all groups side by side."""
    groups, ranks, part = v.shape
    shape = (*x.shape[:-1], groups * ranks)
    # V_g X_g^T for all tokens: X_g V_g^T has too thin a result (benchmarks/results/grouped.md)
    slices = x.reshape(-1, groups, part).permute(1, 2, 0)
    return torch.bmm(v, slices).view(groups * ranks, -1).t().reshape(shape)


def kronecker(
    y: Float[Tensor, "*tokens out"],
    x: Float[Tensor, "*tokens in"],
    a: Float[Tensor, "terms a1 a2"],
    b: Float[Tensor, "terms b1 b2"],
    scale: float,
) -> Float[Tensor, "*tokens out"]:
    """y + scale * sum_t (A_t (x) B_t) x, never formed; out = a1 b1, in = a2 b2.

    For x read row by row as X (a2, b2): (A (x) B) x = vec_r(A X B^T) (Van Loan, "The ubiquitous
    Kronecker product", 2000). A comes first: where out < in that is the cheaper order, and the second
    product is one plain matrix product.
    """
    (terms, a1, a2), (_, b1, b2) = a.shape, b.shape
    rows = x.reshape(-1, a2, b2)
    first = a.transpose(0, 1).reshape(a1 * terms, a2)
    left = torch.bmm(first.expand(len(rows), -1, -1), rows).view(-1, terms * b2)
    second = b.transpose(1, 2).reshape(terms * b2, b1)
    return torch.addmm(y.reshape(-1, b1), left, second, alpha=scale).view(y.shape)
