"""Train the router's reader: which expert should answer, from the text before it.

    loss = cross-entropy of the oracle's expert + regret * E[what the drawn expert loses beyond the best]

The oracle often has two experts that are as good as each other: ties between experts carry no signal
in the second term, which keeps the first from fitting them.

It is trained over whole conversations, through the reader's memory, with the actor's linear
`expert_bias` on top. The router reads below every expert, so the hidden states do not depend on any
decision and are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bem.config import CloningConfig
from bem.errors import TrainingError
from bem.routing.mounted import Mounted
from bem.routing.reader import Reader
from bem.training.chunk_losses import chunk_numbers
from bem.training.data import IGNORED, Encoded, collate
from bem.training.hidden import hidden_states
from bem.training.traces import Traces

WARMUP = 20  # steps
Curve = list[tuple[float, float]]
"""(training, validation) loss of each epoch."""


@dataclass(frozen=True)
class _Batch:
    hidden: Tensor
    """bfloat16 (batch, tokens, d_model), standardised."""
    member: Tensor
    """(batch, chunks, tokens): 1 where a token belongs to the chunk; the first chunk is empty."""
    targets: Tensor
    """int (batch, chunks): expert option by the text before, IGNORED: any."""
    losses: Tensor
    """(batch, chunks, options) of every option."""


def train_reader(
    mounted: Mounted,
    rows: Sequence[Encoded],
    traces: Traces,
    train: Sequence[int],
    validation: Sequence[int],
    pad_id: int,
    config: CloningConfig,
    seed: int,
    on_progress: Callable[[str], None],
) -> Curve:
    """Train the reader of a mounted router on the oracle's expert where an answer is given.

    Args:
        train: rows that teach.
        validation: rows that choose the start and the epoch; other rows are not looked at.
    Returns:
        The curve of the best start; the weights of its best epoch are kept.
    Raises:
        TrainingError: no answer on one side, or the loss was not finite.
    """
    router, device = mounted.router, mounted.base.device
    read = read_states(mounted, rows, [*train, *validation], train, pad_id)
    sides = [read.batches(side, traces, config.reading.batch_size) for side in (train, validation)]
    actor = router.policy.actor
    trainer = ReaderTrainer(router.policy.reader, actor.expert_bias, sides[0], sides[1], config)
    curve = trainer.best_of(config.reading.tries, seed, on_progress)
    router.policy.reader.rescale(read.centre.to(device), read.spread.to(device))
    return curve


@dataclass(frozen=True)
class States:
    """What the router reads of each row, and the chunk of each token."""

    hidden: dict[int, Tensor]
    """bfloat16 (tokens, d_model), standardised: two bytes a number, since all are kept."""
    numbers: dict[int, Tensor]
    """From 1 (tokens,)."""
    centre: Tensor
    spread: Tensor

    def batches(self, side: Sequence[int], traces: Traces, size: int) -> list[_Batch]:
        """The rows of one side, alike in length.

        Raises:
            TrainingError: none of them has an answer.
        """
        order = sorted(side, key=lambda i: (len(self.numbers[i]), i))
        parts = [order[at : at + size] for at in range(0, len(order), size)]
        return _with_answers([_batch(part, self.hidden, self.numbers, traces) for part in parts])


def read_states(
    mounted: Mounted,
    rows: Sequence[Encoded],
    chosen: Sequence[int],
    train: Sequence[int],
    pad_id: int,
) -> States:
    """Read some of the rows once.

    Args:
        train: rows whose mean and spread standardise all of them.
    """
    states = _states(mounted, rows, chosen, pad_id)
    seen = torch.cat([states[i] for i in train]).float()
    centre, spread = seen.mean(0), seen.std(0).clamp(min=1e-3)
    hidden = {i: ((h.float() - centre) / spread).to(h.dtype) for i, h in states.items()}
    chunk_size = mounted.router.chunk_size
    numbers = {i: _chunks_of(rows[i], pad_id, chunk_size) for i in chosen}
    return States(hidden, numbers, centre, spread)


def expected_regret(
    logits: Float[Tensor, "*batch options"], losses: Float[Tensor, "*batch options"], largest: float
) -> Float[Tensor, "*batch"]:
    """What an expert drawn by the logits loses beyond the best one, in nats.

    Args:
        losses: of every option.
        largest: regrets are clipped here.
    """
    regret = (losses - losses.min(-1, keepdim=True).values).clamp(max=largest)
    return (logits.softmax(-1) * regret).sum(-1)


def _states(
    mounted: Mounted, rows: Sequence[Encoded], chosen: Sequence[int], pad_id: int
) -> dict[int, Tensor]:
    """What the router reads of each row (tokens, d_model); two bytes a number, since all are kept."""
    layer = mounted.router_config.router_layer
    assert layer is not None  # `mount` has filled it in
    read = hidden_states(mounted.base, [rows[i] for i in chosen], layer, pad_id)
    return {chosen[at]: states.to("cpu", torch.bfloat16) for at, states in read}


def _chunks_of(row: Encoded, pad_id: int, chunk_size: int) -> Tensor:
    """Number of each token's chunk, from 1."""
    return chunk_numbers(collate([replace(row, route=[])], pad_id), chunk_size)[0]


def _batch(
    rows: list[int], states: dict[int, Tensor], numbers: dict[int, Tensor], traces: Traces
) -> _Batch:
    tokens, n = max(len(states[i]) for i in rows), int(traces.chunks[rows].max())
    hidden = torch.zeros(len(rows), tokens, states[rows[0]].shape[1], dtype=torch.bfloat16)
    member = torch.zeros(len(rows), n + 1, tokens)
    for r, i in enumerate(rows):
        hidden[r, : len(states[i])] = states[i]
        member[r, numbers[i], torch.arange(len(numbers[i]))] = 1.0
    targets = np.where(traces.answers[rows, :n], traces.path[rows, :n], IGNORED)
    losses = torch.from_numpy(traces.experts[rows, :n])
    return _Batch(hidden, member[:, :n], torch.from_numpy(targets), losses)


def _with_answers(batches: list[_Batch]) -> list[_Batch]:
    answered = [batch for batch in batches if bool((batch.targets != IGNORED).any())]
    if not answered:
        raise TrainingError("no answer on one side of the split: trace more conversations.")
    return answered


class ReaderTrainer:
    """Trains one reader, and the `expert_bias` on top of it."""

    def __init__(
        self,
        reader: Reader,
        expert_bias: nn.Linear,
        train: list[_Batch],
        validation: list[_Batch],
        config: CloningConfig,
    ):
        self.reader, self.expert_bias, self.config = reader, expert_bias, config
        self.train, self.validation = train, validation
        self.device = expert_bias.weight.device
        self.modules = nn.ModuleList([reader, expert_bias])

    def best_of(self, tries: int, seed: int, on_progress: Callable[[str], None]) -> Curve:
        """Several starts, for some seeds fail to learn short cues; the best on validation is kept."""
        best, weights, curve = math.inf, self._weights(), []
        for number in range(tries):
            self.reader.reset()
            self.expert_bias.reset_parameters()
            name = f"start {number + 1} of {tries}"
            tried = self.once(seed + number, lambda text, n=name: on_progress(f"{n}, {text}"))
            if (least := min(loss for _, loss in tried)) < best:
                best, weights, curve = least, self._weights(), tried
        self.modules.load_state_dict(weights)
        return curve

    def once(self, seed: int, on_progress: Callable[[str], None], stop: int | None = None) -> Curve:
        """From the weights as they are; those of the epoch that is best on validation stay.

        Args:
            stop: end after so many epochs of the schedule, and keep the last weights instead.
        """
        settings, rng = self.config.reading, np.random.default_rng([seed, 13])
        optimizer = torch.optim.AdamW(
            self.modules.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        best, weights, curve = math.inf, self._weights(), []
        for epoch in range(settings.epochs if stop is None else stop):
            curve.append((self._epoch(optimizer, schedule, rng), self.validation_loss()))
            on_progress(
                f"reading {epoch + 1} of {settings.epochs}: validation loss {curve[-1][1]:.3f}"
            )
            if not math.isfinite(sum(curve[-1])):
                raise TrainingError(
                    f"the reader diverged: loss {curve[-1]}. Lower routing.cloning.reading.learning_rate "
                    f"(now {settings.learning_rate:g})."
                )
            if stop is not None or curve[-1][1] < best:
                best, weights = curve[-1][1], self._weights()
        self.modules.load_state_dict(weights)
        return curve

    def _rate(self, step: int) -> float:
        """Factor on the learning rate: up in a line, down along a cosine."""
        steps = self.config.reading.epochs * len(self.train)
        return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))

    def _epoch(self, optimizer: Any, schedule: Any, rng: np.random.Generator) -> float:
        total, answers = 0.0, 0
        for i in rng.permutation(len(self.train)):
            loss, count = self._loss(self.train[int(i)], self.config.reading.dropout)
            optimizer.zero_grad()
            (loss / count).backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total, answers = total + float(loss.detach()), answers + count
        return total / answers

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Of the weights as they are, per answer."""
        losses = [self._loss(batch, 0.0) for batch in self.validation]
        return sum(float(loss) for loss, _ in losses) / sum(count for _, count in losses)

    def _loss(self, batch: _Batch, dropout: float) -> tuple[Tensor, int]:
        """(sum over the batch's answers, their number)."""
        hidden = batch.hidden.to(self.device).float()
        embedded = self.reader.embed(F.dropout(hidden, dropout))
        sums = torch.bmm(batch.member.to(self.device), embedded)
        memory = self.reader.update_memory(sums, sums.new_zeros(len(sums), self.reader.width))
        answers = (batch.targets != IGNORED).to(self.device)
        logits = self.expert_bias(F.dropout(memory, dropout))[answers]
        targets, losses = (t.to(self.device)[answers] for t in (batch.targets, batch.losses))
        regret = expected_regret(logits, losses, self.config.largest_regret)
        each = F.cross_entropy(logits, targets, reduction="none") + self.config.regret * regret
        return each.sum(), len(targets)

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.modules.state_dict().items()}
