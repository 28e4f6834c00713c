"""The shipped cross-encoder: query and passage in one small transformer, on top of BM25.

    logit = w * BM25 + b + MLP([start state, mean query state, kernel counts, summary of the pair])

The MLP's last layer starts at zero and w > 0, so an untrained model orders exactly as BM25 does and
training can only add to it. The kernels count soft matches of contextual states (Xiong et al. 2017,
"End-to-End Neural Ad-hoc Ranking with Kernel Pooling"; over transformer states: Hofstätter et al.
2020, "Interpretable & Time-Budget-Constrained Contextualization for Re-Ranking").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bem.evidence.pairs import PAIR_FEATURES, WORD_FEATURES
from bem.evidence.reading import MAX_PASSAGE, MAX_QUERY

KERNELS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1)
"""Centres of the soft-match kernels, in cosine."""


@dataclass(frozen=True)
class Shape:
    """Size of the model; plain values, as kept in config.json."""

    d_model: int = 96
    n_layers: int = 2
    n_heads: int = 3
    d_ff: int = 256
    vocab: int = 4096


class Block(nn.Module):
    """Pre-norm self-attention over query and passage together, then an MLP."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, s, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, s, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, s, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyReranker(nn.Module):
    """Logits of pairs; see the module's docstring for the formula."""

    def __init__(self, shape: Shape, dropout: float = 0.1):
        super().__init__()
        d = shape.d_model
        self.shape, self.dropout = shape, dropout
        self.pieces = nn.Embedding(shape.vocab, d, padding_idx=0)
        self.segments = nn.Embedding(4, d)
        self.positions = nn.Embedding(max(MAX_QUERY, MAX_PASSAGE), d)
        self.codes = nn.Embedding(MAX_QUERY + 1, d, padding_idx=0)
        self.features = nn.Linear(WORD_FEATURES, d)
        self.blocks = nn.ModuleList(
            Block(d, shape.n_heads, shape.d_ff) for _ in range(shape.n_layers)
        )
        self.norm = nn.LayerNorm(d)
        self.head = nn.Sequential(
            nn.Linear(2 * d + 2 * len(KERNELS) + PAIR_FEATURES, 96), nn.GELU(), nn.Linear(96, 1)
        )
        for table in (self.segments, self.positions, self.codes):
            nn.init.normal_(table.weight, std=0.05)
        nn.init.normal_(self.pieces.weight, std=0.05)
        with torch.no_grad():
            self.pieces.weight[0].zero_()  # "no piece" adds nothing to a word
            self.codes.weight[0].zero_()
        nn.init.zeros_(self.head[2].weight)  # pyright: ignore
        nn.init.zeros_(self.head[2].bias)  # pyright: ignore
        self.lexical = nn.Parameter(torch.tensor(3.0))  # per 10 points of BM25
        self.bias = nn.Parameter(torch.tensor(-4.0))

    def forward(
        self,
        pieces: Tensor,
        words: Tensor,
        segments: Tensor,
        positions: Tensor,
        codes: Tensor,
        features: Tensor,
        summary: Tensor,
        first: int,
    ) -> Tensor:
        """[n] logits of `Pairs`, whose fields these are; `first`: column where passages begin."""
        bags = F.embedding(pieces, self.pieces.weight, padding_idx=0)
        bags = bags.sum(1) / (pieces > 0).sum(1, keepdim=True).clamp(min=1)
        static = F.embedding(words, bags)
        x = static + self.segments(segments) + self.positions(positions)
        x = x + self.codes(codes) + self.features(features)
        x = F.dropout(x, self.dropout, self.training)
        mask = (segments > 0)[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        rarity = features[:, 1:first, 1]
        counts = [
            _kernels(y[:, 1:first], y[:, first:], segments[:, first:] == 3, rarity)
            for y in (x, static)
        ]
        query = (x[:, 1:first] * rarity[..., None]).sum(1) / (rarity.sum(1) + 1e-6)[:, None]
        pooled = F.dropout(torch.cat([x[:, 0], query], dim=1), self.dropout, self.training)
        top = self.head(torch.cat([pooled, *counts, summary], dim=1))[:, 0]
        return top + self.lexical * summary[:, 0] + self.bias


def _kernels(query: Tensor, passage: Tensor, there: Tensor, rarity: Tensor) -> Tensor:
    """[n, kernels] mean over query words, weighted by rarity, of log(1 + soft matches)."""
    cosine = F.normalize(query, dim=-1) @ F.normalize(passage, dim=-1).transpose(1, 2)
    found = []
    for centre in KERNELS:
        width = 0.02 if centre == 1.0 else 0.1
        near = torch.exp(-((cosine - centre) ** 2) / (2 * width**2)) * there[:, None]
        found.append((torch.log1p(near.sum(2)) * rarity).sum(1) / (rarity.sum(1) + 1e-6))
    return torch.stack(found, dim=1)
