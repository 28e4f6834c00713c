"""The router learns to read: who should answer, from what was said before.

    loss = cross-entropy of the oracle's expert + regret * E[what the drawn expert loses beyond the best]

The oracle often has two experts that are as good as each other; which of them was better by a hair
teaches nothing, and the second term does not ask for it.

It learns over whole conversations, through the reader's memory, with the actor's linear opinion on
top. What is read lies below every expert: it is what was said, whatever was done, so the hidden states
are computed once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bem.adapters.sites import find_sites
from bem.errors import TrainingError
from bem.training.data import IGNORED, Encoded, collate
from bem.training.traces import Traces, chunk_numbers

if TYPE_CHECKING:
    from bem.config import CloningConfig
    from bem.routing.mounted import Mounted
    from bem.routing.reader import Reader

WARMUP = 20  # steps


class _Enough(Exception):
    """What was wanted is known: the layers above need not run."""


@torch.no_grad()
def hidden_states(
    base: Any, rows: Sequence[Encoded], layer: int, pad_id: int, batch_size: int = 16
) -> Iterator[tuple[int, Tensor]]:
    """(row, hidden states (tokens, d_model) that enter a layer) of each row, the shortest first.

    Nothing from that layer on is computed.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(rows), batch_size):
        chosen = order[at : at + batch_size]
        batch = collate([replace(rows[i], route=[]) for i in chosen], pad_id)
        inputs = {n: batch[n].to(base.device) for n in ("input_ids", "attention_mask")}
        with up_to(base, layer, decide=False) as caught:
            base(**inputs, use_cache=False)
        yield from ((i, caught[0][r, -len(rows[i]) :]) for r, i in enumerate(chosen))


@contextlib.contextmanager
def up_to(base: Any, layer: int, decide: bool) -> Iterator[list[Tensor]]:
    """A forward pass inside ends where the layer begins; gives the hidden states that entered it.

    Args:
        decide: an adapter that reads this layer's input has its turn before the end.
    """
    caught: list[Tensor] = []

    def stop(_: Any, args: tuple, given: dict) -> None:
        caught.append(args[0] if args else given["hidden_states"])
        raise _Enough

    block = base.get_submodule(find_sites(base).blocks[layer])
    handle = block.register_forward_pre_hook(stop, with_kwargs=True, prepend=not decide)
    try:
        with contextlib.suppress(_Enough):
            yield caught
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Batch:
    hidden: Tensor  # bfloat16 (batch, tokens, d_model)
    member: (
        Tensor  # (batch, chunks, tokens): 1 where a token belongs to the chunk; the first is empty
    )
    targets: Tensor  # int (batch, chunks): expert option by what was said before, IGNORED: any
    losses: Tensor  # (batch, chunks, options) of every option


def learn_to_read(
    mounted: Mounted,
    rows: Sequence[Encoded],
    traces: Traces,
    held: Tensor,
    pad_id: int,
    config: CloningConfig,
    seed: int,
    on_progress: Callable[[str], None],
) -> list[tuple[float, float]]:
    """Train the reader of a mounted router on the oracle's expert where an answer is given.

    Args:
        held: bool (rows,), conversations that choose the epoch and teach nothing.
    Returns:
        (training, held-out) loss of each epoch of the best start; the weights of its best are kept.
    Raises:
        TrainingError: the loss was not finite.
    """
    router, device = mounted.router, mounted.base.device
    states = _states(mounted, rows, pad_id)
    learns = torch.cat([h for h, out in zip(states, held.tolist(), strict=True) if not out])
    centre, spread = learns.float().mean(0), learns.float().std(0).clamp(min=1e-3)
    states = [((h.float() - centre) / spread).to(h.dtype) for h in states]
    numbers = [_numbers(row, pad_id, router.chunk_size) for row in rows]
    order, size = sorted(range(len(rows)), key=lambda i: len(rows[i])), config.reading.batch_size
    sides = []
    for side in (False, True):
        part = [i for i in order if bool(held[i]) == side]
        parts = [part[at : at + size] for at in range(0, len(part), size)]
        sides.append([_batch(chosen, states, numbers, traces) for chosen in parts])
    train, test = sides
    school = _School(router.policy.reader, router.policy.actor.opinion, train, test, config)
    curve = school.best_of(config.reading.tries, seed, on_progress)
    router.policy.reader.rescale(centre.to(device), spread.to(device))
    return curve


def _states(mounted: Mounted, rows: Sequence[Encoded], pad_id: int) -> list[Tensor]:
    """What the router reads of each row (tokens, d_model); two bytes a number, since all are kept."""
    layer = mounted.router_config.router_layer
    assert layer is not None
    states = [torch.empty(0)] * len(rows)
    for i, found in hidden_states(mounted.base, rows, layer, pad_id):
        states[i] = found.to("cpu", torch.bfloat16)
    return states


def expected_regret(logits: Tensor, losses: Tensor, largest: float) -> Tensor:
    """What an expert drawn by logits (..., options) loses beyond the best one (...), in nats.

    Args:
        losses: of every option, (..., options).
        largest: regrets are clipped here.
    """
    regret = (losses - losses.min(-1, keepdim=True).values).clamp(max=largest)
    return (logits.softmax(-1) * regret).sum(-1)


def _numbers(row: Encoded, pad_id: int, chunk_size: int) -> Tensor:
    return chunk_numbers(collate([replace(row, route=[])], pad_id), chunk_size)[0]


def _batch(rows: list[int], states: list[Tensor], numbers: list[Tensor], traces: Traces) -> _Batch:
    tokens, n = max(len(states[i]) for i in rows), int(traces.chunks[rows].max())
    hidden = torch.zeros(len(rows), tokens, states[rows[0]].shape[1], dtype=torch.bfloat16)
    member = torch.zeros(len(rows), n + 1, tokens)
    for r, i in enumerate(rows):
        hidden[r, : len(states[i])] = states[i]
        member[r, numbers[i], torch.arange(len(numbers[i]))] = 1.0
    targets = np.where(traces.answers[rows, :n], traces.path[rows, :n], IGNORED)
    losses = torch.from_numpy(traces.experts[rows, :n])
    return _Batch(hidden, member[:, :n], torch.from_numpy(targets), losses)


class _School:
    """Teaches one reader, and the opinion on top of it."""

    def __init__(
        self,
        reader: Reader,
        opinion: nn.Linear,
        train: list[_Batch],
        test: list[_Batch],
        config: CloningConfig,
    ):
        self.reader, self.opinion, self.config = reader, opinion, config
        self.train, self.test, self.device = train, test, opinion.weight.device
        self.modules = nn.ModuleList([reader, opinion])

    def best_of(
        self, tries: int, seed: int, say: Callable[[str], None]
    ) -> list[tuple[float, float]]:
        """Several starts: some never come to hear the shortest cues. The best on held-out rows is kept."""
        best, kept, curve = math.inf, self._weights(), []
        for number in range(tries):
            self.reader.reset()
            self.opinion.reset_parameters()
            of = f"start {number + 1} of {tries}"
            found = self._once(seed + number, lambda text, of=of: say(f"{of}, {text}"))
            if (least := min(held for _, held in found)) < best:
                best, kept, curve = least, self._weights(), found
        self.modules.load_state_dict(kept)
        return curve

    def _once(self, seed: int, say: Callable[[str], None]) -> list[tuple[float, float]]:
        settings, rng = self.config.reading, np.random.default_rng([seed, 13])
        optimizer = torch.optim.AdamW(
            self.modules.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        pace = torch.optim.lr_scheduler.LambdaLR(optimizer, self._pace)
        best, kept, curve = math.inf, self._weights(), []
        for epoch in range(settings.epochs):
            curve.append((self._epoch(optimizer, pace, rng), self._held()))
            say(f"reading {epoch + 1} of {settings.epochs}: held-out loss {curve[-1][1]:.3f}")
            if not math.isfinite(sum(curve[-1])):
                raise TrainingError(
                    f"the reader diverged: loss {curve[-1]}. Lower routing.cloning.reading.learning_rate "
                    f"(now {settings.learning_rate:g})."
                )
            if curve[-1][1] < best:
                best, kept = curve[-1][1], self._weights()
        self.modules.load_state_dict(kept)
        return curve

    def _pace(self, step: int) -> float:
        """Factor on the learning rate: up in a line, down along a cosine."""
        steps = self.config.reading.epochs * len(self.train)
        return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))

    def _epoch(self, optimizer: Any, pace: Any, rng: np.random.Generator) -> float:
        total, answers = 0.0, 0
        for i in rng.permutation(len(self.train)):
            loss, count = self._loss(self.train[int(i)], self.config.reading.dropout)
            optimizer.zero_grad()
            (loss / count).backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            optimizer.step()
            pace.step()
            total, answers = total + float(loss.detach()), answers + count
        return total / answers

    @torch.no_grad()
    def _held(self) -> float:
        found = [self._loss(batch, 0.0) for batch in self.test]
        return sum(float(loss) for loss, _ in found) / sum(count for _, count in found)

    def _loss(self, batch: _Batch, dropout: float) -> tuple[Tensor, int]:
        """(sum over the batch's answers, their number)."""
        hidden = batch.hidden.to(self.device).float()
        words = self.reader.hear(F.dropout(hidden, dropout))
        heard = torch.bmm(batch.member.to(self.device), words)
        memory = self.reader.remember(heard, heard.new_zeros(len(heard), self.reader.width))
        answers = (batch.targets != IGNORED).to(self.device)
        logits = self.opinion(F.dropout(memory, dropout))[answers]
        targets, losses = (t.to(self.device)[answers] for t in (batch.targets, batch.losses))
        regret = expected_regret(logits, losses, self.config.largest_regret)
        each = F.cross_entropy(logits, targets, reduction="none") + self.config.regret * regret
        return each.sum(), len(targets)

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.modules.state_dict().items()}
