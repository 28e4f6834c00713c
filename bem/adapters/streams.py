"""Models that carry several streams of hidden states from block to block (hyper-connections, AltUp).

A controller reads their mean; FiLM changes each of them alike. Everywhere else there is one stream,
(batch, tokens, d_model), and it is handed on as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """How the hidden states between blocks hold their streams."""

    dim: int = 2
    """Which of four dimensions counts them."""
    side_by_side: int = 1
    """How many stand side by side in the last of three dimensions."""

    def one(self, hidden: Tensor) -> Tensor:
        """Their mean (batch, tokens, d_model)."""
        if hidden.dim() == 3 and self.side_by_side == 1:
            return hidden
        return self._apart(hidden).mean(self.dim)

    def each(self, hidden: Tensor, change: Callable[..., Tensor], *control: Any) -> Tensor:
        """Every stream changed in the same way."""
        if hidden.dim() == 3 and self.side_by_side == 1:
            return change(hidden, *control)
        streams = [change(stream, *control) for stream in self._apart(hidden).unbind(self.dim)]
        return torch.stack(streams, self.dim).view(hidden.shape)

    def _apart(self, hidden: Tensor) -> Tensor:
        return hidden if hidden.dim() == 4 else hidden.unflatten(-1, (self.side_by_side, -1))


def streams_of(model: Any) -> Streams:
    """As the model's config says."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "altup_num_inputs", 0):  # (streams, batch, tokens, d_model)
        return Streams(dim=0)
    return Streams(side_by_side=getattr(config, "hc_count", 1) or 1)
