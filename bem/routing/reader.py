"""What was said so far, as the router remembers it.

    word_t   = tanh(W h_t + b) * sigmoid(G h_t + c)        of every token
    heard_k  = sum of word_t over the tokens of chunk k
    memory_k = GRU(heard_k, memory_{k-1})

A token is heard only as far as its gate opens (gated attention pooling, arXiv:1802.04712), and it is
summed, not averaged: a cue of five words is not drowned by the hundred around it. The memory holds it
until something else is asked for, over any number of turns; it travels with the K/V cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHUT, KEPT, LOUD = -2.0, 1.0, 3.0
"""Where the weights start: most tokens are not heard, most of the memory is kept, and what is heard
counts three times as much as a GRU's usual start has it. Chosen on training conversations of
configs/routing.yaml: right answers after 10 passes over 1600 of them .970 -> .985 (KEPT) -> .990."""


class Reader(nn.Module):
    """Hidden states in, a memory per chunk out. Learned by `bem.training.reading`, then frozen."""

    def __init__(self, d_model: int, d_read: int, memory: int):
        """d_read: numbers heard of each token; memory: width of the memory."""
        super().__init__()
        self.d_read, self.width = d_read, memory
        self.token = nn.Linear(d_model, 2 * d_read)
        self.gru = nn.GRU(d_read, memory, batch_first=True)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw new weights from torch's generator."""
        self.token.reset_parameters()
        self.gru.reset_parameters()
        self.token.bias[self.d_read :] += SHUT
        _, update, _ = self.gru.get_parameter("bias_ih_l0").chunk(3)
        update += KEPT
        self.gru.get_parameter("weight_ih_l0").mul_(LOUD)

    def hear(self, hidden: Tensor) -> Tensor:
        """Words (batch, tokens, d_read), float32, of hidden states (batch, tokens, d_model)."""
        word, gate = self.token(hidden.detach().float()).chunk(2, -1)
        return torch.tanh(word) * torch.sigmoid(gate)

    def remember(self, heard: Tensor, before: Tensor) -> Tensor:
        """The memory after each chunk (batch, chunks, memory).

        Args:
            heard: sums of the words of each chunk (batch, chunks, d_read).
            before: memory (batch, memory) before the first of them.
        """
        return self.gru(heard, before[None].contiguous())[0]

    @torch.no_grad()
    def rescale(self, centre: Tensor, spread: Tensor) -> None:
        """From weights for (hidden states - centre) / spread, both (d_model,), to weights for hidden states."""
        self.token.weight.div_(spread)
        self.token.bias.sub_(self.token.weight @ centre)

    def flops(self, tokens: int) -> int:
        """Matrix FLOPs of one chunk of so many tokens."""
        gru = sum(p.numel() for n, p in self.gru.named_parameters() if n.startswith("weight"))
        return 2 * (tokens * self.token.weight.numel() + gru)
