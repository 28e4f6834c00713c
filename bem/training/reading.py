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
    hidden: Tensor  # (batch, tokens, d_model)
    member: (
        Tensor  # (batch, chunks, tokens): which chunk a token belongs to; the first one is empty
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
    reader, layer = mounted.router.policy.reader, mounted.router_config.router_layer
    assert layer is not None
    states, out = [torch.empty(0)] * len(rows), held.tolist()
    for i, found in hidden_states(mounted.base, rows, layer, pad_id):
        states[i] = found.to("cpu", torch.bfloat16)  # two bytes a number: they are kept
    seen = torch.cat([h for h, o in zip(states, out, strict=True) if not o]).float()
    centre, spread = seen.mean(0), seen.std(0).clamp(min=1e-3)
    states = [((h.float() - centre) / spread).to(torch.bfloat16) for h in states]
    chunks = [_chunks(row, pad_id, mounted.router.chunk_size) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    size = config.reading.batch_size
    sides = [[i for i in order if out[i] == side] for side in (False, True)]
    train, test = (
        [_batch(part[at : at + size], states, chunks, traces) for at in range(0, len(part), size)]
        for part in sides
    )
    opinion = mounted.router.policy.actor.opinion
    curve = _best_of(reader, opinion, train, test, config, seed, on_progress)
    reader.rescale(centre.to(mounted.base.device), spread.to(mounted.base.device))
    return curve


def expected_regret(logits: Tensor, losses: Tensor, largest: float) -> Tensor:
    """What an expert drawn by logits (..., options) loses beyond the best one (...), in nats.

    Args:
        losses: of every option, (..., options).
        largest: regrets are clipped here.
    """
    regret = (losses - losses.min(-1, keepdim=True).values).clamp(max=largest)
    return (logits.softmax(-1) * regret).sum(-1)


def _chunks(row: Encoded, pad_id: int, chunk_size: int) -> Tensor:
    return chunk_numbers(collate([replace(row, route=[])], pad_id), chunk_size)[0]


def _batch(rows: list[int], states: list[Tensor], chunks: list[Tensor], traces: Traces) -> _Batch:
    tokens, n = max(len(states[i]) for i in rows), int(traces.chunks[rows].max())
    hidden = torch.zeros(len(rows), tokens, states[rows[0]].shape[1], dtype=torch.bfloat16)
    member = torch.zeros(len(rows), n + 1, tokens)
    for r, i in enumerate(rows):
        hidden[r, : len(states[i])] = states[i]
        member[r, chunks[i], torch.arange(len(chunks[i]))] = 1.0
    targets = np.where(traces.answers[rows, :n], traces.path[rows, :n], IGNORED)
    losses = torch.from_numpy(traces.experts[rows, :n])
    return _Batch(hidden, member[:, :n], torch.from_numpy(targets), losses)


def _best_of(
    reader: Reader,
    opinion: nn.Linear,
    train: list[_Batch],
    test: list[_Batch],
    config: CloningConfig,
    seed: int,
    say: Callable[[str], None],
) -> list[tuple[float, float]]:
    """Several starts: some never come to hear the shortest cues. The best on held-out rows is kept."""
    modules, tries = nn.ModuleList([reader, opinion]), config.reading.tries
    best, kept, curve = math.inf, None, []
    for number in range(tries):
        reader.reset()
        opinion.reset_parameters()
        of = f"start {number + 1} of {tries}, "
        found = _descend(
            reader, opinion, train, test, config, seed + number, lambda text, of=of: say(of + text)
        )
        if (least := min(held for _, held in found)) < best:
            best, curve = least, found
            kept = {name: value.clone() for name, value in modules.state_dict().items()}
    assert kept is not None
    modules.load_state_dict(kept)
    return curve


def _descend(
    reader: Reader,
    opinion: nn.Linear,
    train: list[_Batch],
    test: list[_Batch],
    cloning: CloningConfig,
    seed: int,
    say: Callable[[str], None],
) -> list[tuple[float, float]]:
    config, device = cloning.reading, reader.token.weight.device
    parameters = [*reader.parameters(), *opinion.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    steps = config.epochs * len(train)
    pace = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min(1.0, (n + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * n / steps)),
    )

    def loss_of(batch: _Batch, dropout: float) -> tuple[Tensor, int]:
        hidden = batch.hidden.to(device).float()
        words = reader.hear(F.dropout(hidden, dropout, training=dropout > 0))
        heard = torch.bmm(batch.member.to(device), words)
        before = heard.new_zeros(len(heard), reader.width)
        memory = F.dropout(reader.remember(heard, before), dropout, training=dropout > 0)
        answers = (batch.targets != IGNORED).to(device)
        logits, targets = opinion(memory)[answers], batch.targets.to(device)[answers]
        regret = expected_regret(logits, batch.losses.to(device)[answers], cloning.largest_regret)
        each = F.cross_entropy(logits, targets, reduction="none") + cloning.regret * regret
        return each.sum(), len(targets)

    rng = np.random.default_rng([seed, 13])
    best, kept, curve = math.inf, None, []
    for epoch in range(config.epochs):
        sums = np.zeros(2)
        for i in rng.permutation(len(train)):
            loss, count = loss_of(train[i], config.dropout)
            optimizer.zero_grad()
            (loss / count).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            pace.step()
            sums += float(loss.detach()), count
        with torch.no_grad():
            held = np.sum([[float(x) for x in loss_of(batch, 0.0)] for batch in test], 0)
        curve.append((float(sums[0] / sums[1]), float(held[0] / held[1])))
        say(f"reading {epoch + 1} of {config.epochs}: held-out loss {curve[-1][1]:.3f}")
        if not math.isfinite(sum(curve[-1])):
            raise TrainingError(
                f"the reader diverged: loss {curve[-1]}. Lower router.cloning.reading.learning_rate "
                f"(now {config.learning_rate:g})."
            )
        if curve[-1][1] < best:
            best, kept = curve[-1][1], [p.detach().clone() for p in parameters]
    assert kept is not None
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return curve
