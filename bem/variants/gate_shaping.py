"""V2: evidence that is known before generation shapes attention and gates.

Three parts, on top of PT1's head-group gates: a temperature per head (here), evidence features as
input of the gates and of the controller, and a loss that aligns the gates' magnitude with the
margin of the evidence (`margin_alignment`, used by `HeadGate`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bem.config import EVIDENCE_FEATURES
from bem.variants.base import Code, Flops, linear64

MARGIN = EVIDENCE_FEATURES.index("margin")
PRESENT = EVIDENCE_FEATURES.index("present")


class GateShapingV2(nn.Module):
    """Temperature of each head's attention logits, a function of the evidence alone.

    T_h = 0.5 + 1.5 sigmoid(w_h e + b_h - ln 2), in [0.5, 2] and 1 at start; softmax(logits / T_h).
    Dividing the logits is dividing the queries: keys and values, and so the cache, stay as they are.
    It is applied per token as a factor on the queries, which the frozen layer has computed anyway.
    """

    def __init__(self, n_evidence: int, n_heads: int):
        """n_evidence: features of the evidence; n_heads: query heads of the layer."""
        super().__init__()
        self.head = nn.Linear(n_evidence, n_heads)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.control_width = n_heads

    def control(self, code: Code) -> Tensor:
        """1 / T_h of each chunk: (batch, chunks, n_heads)."""
        shift = math.log(2)  # sigmoid(-ln 2) = 1/3, so T = 1 exactly
        return 1 / (
            0.5 + 1.5 * torch.sigmoid(linear64(self.head, code.conditioning["evidence"]) - shift)
        )

    def flops(self) -> Flops:
        return Flops(per_chunk=2 * self.head.weight.numel())


def margin_alignment(
    gates: Tensor, evidence: Tensor, real: Tensor, margin_scale: float
) -> Tensor | None:
    """(mean gate - margin_scale * margin)^2, averaged over a row's chunks that have evidence, then over all
    rows; a row without evidence counts 0. So rows add up the same however a step is cut into batches.

    Args:
        gates: (batch, chunks, groups), in (0, 2).
        evidence: (batch, chunks, len(EVIDENCE_FEATURES)); the margin (best - median relevance) is
            one of them, in [0, 1].
        real: bool (batch, chunks): the slot holds tokens.
        margin_scale: 2 maps the range of the margin onto that of the gates.
    Returns:
        scalar; None if no chunk has evidence.
    """
    has = real & (evidence[..., PRESENT] > 0)
    if not has.any():
        return None
    error = gates.mean(-1) - margin_scale * evidence[..., MARGIN]
    return ((error.square() * has).sum(1) / has.sum(1).clamp(min=1)).mean()
