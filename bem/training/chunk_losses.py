"""What every chunk of a conversation loses under one route."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from bem.control.chunks import chunk_starts
from bem.routing.modes import mode
from bem.routing.mounted import Mounted
from bem.training.data import IGNORED, Encoded, collate
from bem.training.hidden import LowerBlocks
from bem.training.losses import answer_columns, answer_logits, answer_targets, token_nll

Floats = NDArray[np.float32]
KEPT = 1 << 30
"""Bytes of hidden states that are kept from one pass to the next; batches beyond are read from the first block on."""


class LossReader:
    """Reads the same conversations again and again, under one route after the other: the blocks below the
    experts once."""

    def __init__(
        self,
        mounted: Mounted,
        rows: Sequence[Encoded],
        pad_id: int,
        size: int,
        on_pass: Callable[[], None],
    ):
        """size: rows read at once; on_pass: called after every pass over all rows."""
        self.mounted, self.on_pass = mounted, on_pass
        self.device = mounted.base.device
        layer = mounted.router_config.router_layer
        assert layer is not None  # `mount` has filled it in
        self._lower, self._room = LowerBlocks(mounted.base, layer), KEPT
        self._known: dict[int, Any] = {}
        self.batches: list[tuple[list[int], dict[str, Tensor], Tensor]] = []
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        plain = [replace(row, route=[]) for row in rows]
        for at in range(0, len(rows), size):
            chosen = order[at : at + size]
            batch = collate([plain[i] for i in chosen], pad_id)
            self.batches.append((chosen, batch, chunk_numbers(batch, mounted.router.chunk_size)))
        longest = max(int(number.max()) for _, _, number in self.batches)
        self.shape = (len(rows), longest)
        self.real = np.zeros(self.shape, bool)
        self.answers = np.zeros(self.shape, bool)
        self.turns = np.zeros(self.shape, bool)
        for chosen, batch, number in self.batches:
            self._describe(chosen, batch, number)

    def _describe(self, chosen: list[int], batch: dict[str, Tensor], number: Tensor) -> None:
        predicts = torch.zeros_like(batch["labels"], dtype=torch.bool)
        predicts[:, :-1] = batch["labels"][:, 1:] != IGNORED
        for r, i in enumerate(chosen):
            self.real[i, : int(number[r].max())] = True
            self.answers[i, np.unique(number[r][predicts[r]].numpy()) - 1] = True
            self.turns[i, number[r][batch["turn_starts"][r]].numpy() - 1] = True

    @torch.inference_mode()
    def losses(
        self, expert: int | NDArray[np.int64], rank: int | None, strength: int | None
    ) -> Floats:
        """Loss of every chunk (rows, chunks) under one expert option, or one for each chunk."""
        losses = np.zeros(self.shape, np.float64)
        plain = self.mounted.router.space.plain
        rest = (0, plain[1] if rank is None else rank, plain[2] if strength is None else strength)
        with mode(self.mounted.model, training=False):
            for chosen, batch, number in self.batches:
                options = torch.full_like(number, expert if isinstance(expert, int) else 0)
                if not isinstance(expert, int):
                    of_chunk = torch.from_numpy(expert[chosen])
                    options = of_chunk.gather(1, (number - 1).clamp(min=0))
                others = options.new_tensor(rest).expand(*options.shape, 3)
                route = torch.cat([options[..., None], others], -1)
                route = torch.where(options[..., None] < 0, -1, route)
                with self._lower_known(chosen[0]):
                    losses[chosen] = self._read(batch, number, route)
        self.on_pass()
        return losses.astype(np.float32)

    @contextmanager
    def _lower_known(self, batch: int) -> Iterator[None]:
        """One pass over a batch, named by its first row, inside."""
        known = self._known.get(batch)
        with self._lower.giving(known) as given:
            yield
        if known is None and given:
            states = given[0][0] if isinstance(given[0], tuple) else given[0]
            if states.nbytes <= self._room:
                self._known[batch], self._room = given[0], self._room - states.nbytes

    def _read(self, batch: dict[str, Tensor], number: Tensor, route: Tensor) -> NDArray[np.float64]:
        inputs = {k: v.to(self.device) for k, v in {**batch, "route": route}.items()}
        targets = answer_targets(batch["labels"])
        logits = answer_logits(self.mounted.model, inputs)
        nll = token_nll(logits, targets.to(self.device)).cpu()
        counted, columns = targets != IGNORED, answer_columns(batch["labels"])
        turn = batch["turn_starts"].long().cumsum(1)[:, columns]
        at = number[:, columns]
        weight = _per_turn(counted, turn)
        losses = torch.zeros(len(number), self.shape[1], dtype=torch.float64)
        losses.scatter_add_(1, (at - 1).clamp(min=0), (nll * weight).double())
        return losses.numpy()


def chunk_numbers(batch: dict[str, Tensor], chunk_size: int) -> Int[Tensor, "batch tokens"]:
    """Number of each token's chunk from 1; 0 at padding before the first."""
    valid = batch["attention_mask"].bool()
    carried = torch.zeros(len(valid), dtype=torch.long)
    return chunk_starts(valid, batch["turn_starts"], carried, chunk_size).long().cumsum(1)


def _per_turn(counted: Tensor, turn: Tensor) -> Tensor:
    """1 / (answer tokens of the turn) at every counted position, 0 elsewhere."""
    n = torch.zeros(len(turn), int(turn.max()) + 1)
    n.scatter_add_(1, turn, counted.float())
    return counted / n.gather(1, turn).clamp(min=1)
