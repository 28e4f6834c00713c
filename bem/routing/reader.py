"""The text so far, as the router remembers it.

    token_t  = tanh(W h_t + b) * sigmoid(G h_t + c)        embedding of every token
    sum_k    = sum of token_t over the tokens of chunk k
    memory_k = GRU(sum_k, memory_{k-1})

A token counts only as far as its gate opens (gated attention pooling, arXiv:1802.04712), and
embeddings are summed, not averaged: a cue of five words is not drowned by the hundred around it. The
memory keeps it over any number of turns and travels with the K/V cache.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

GATE_BIAS, KEEP_BIAS, INPUT_GAIN = -2.0, 1.0, 3.0
"""Where the weights start: most token gates shut, most of the memory kept, and inputs of the GRU three
times as strong as usual, so that a short cue is not forgotten before it is learned. Set by hand."""


class Reader(nn.Module):
    """Hidden states in, a memory per chunk out. Trained by `bem.training.reader`, then frozen."""

    def __init__(self, d_model: int, d_read: int, memory: int):
        """d_read: width of a token's embedding; memory: width of the memory."""
        super().__init__()
        self.d_read, self.width = d_read, memory
        self.token = nn.Linear(d_model, 2 * d_read)
        self.gru = nn.GRU(d_read, memory, batch_first=True)
        self.reset()

    def train(self, mode: bool = True) -> Reader:
        """The GRU stays in training mode: it has no dropout, and cuDNN's has no backward pass without."""
        super().train(mode)
        self.gru.train()
        return self

    @torch.no_grad()
    def reset(self) -> None:
        """Draw new weights from torch's generator."""
        self.token.reset_parameters()
        self.gru.reset_parameters()
        self.token.bias[self.d_read :] += GATE_BIAS
        _, update, _ = self.gru.get_parameter("bias_ih_l0").chunk(3)
        update += KEEP_BIAS
        self.gru.get_parameter("weight_ih_l0").mul_(INPUT_GAIN)

    def embed(
        self, hidden: Float[Tensor, "batch tokens d_model"]
    ) -> Float[Tensor, "batch tokens d_read"]:
        """Gated embedding of each token, in float32."""
        value, gate = self.token(hidden.detach().float()).chunk(2, -1)
        return torch.tanh(value) * torch.sigmoid(gate)

    def update_memory(
        self, sums: Float[Tensor, "batch chunks d_read"], before: Float[Tensor, "batch memory"]
    ) -> Float[Tensor, "batch chunks memory"]:
        """The memory after each chunk.

        Args:
            sums: of the embeddings of each chunk's tokens.
            before: the memory before the first chunk.
        """
        return self.gru(sums, before[None].contiguous())[0]

    @torch.no_grad()
    def rescale(self, centre: Float[Tensor, " d_model"], spread: Float[Tensor, " d_model"]) -> None:
        """From weights for (hidden states - centre) / spread to weights for hidden states."""
        self.token.weight.div_(spread)
        self.token.bias.sub_(self.token.weight @ centre)

    def flops(self, tokens: int) -> int:
        """Matrix FLOPs of one chunk of so many tokens."""
        gru = sum(p.numel() for n, p in self.gru.named_parameters() if n.startswith("weight"))
        return 2 * (tokens * self.token.weight.numel() + gru)
