"""Oracle traces: what every expert would have lost on every chunk, and the best path through it.

Each conversation is read once under every option of the expert head (0: the bare base), then once
more under every rank budget and every strength along the best path. What a chunk loses is the summed
NLL of the answer tokens that it predicts, divided by the answer tokens of its turn: a turn then
counts the same whatever its length, and costs are in nats per answer token.

The losses of option e are those of a conversation that was under e throughout: the exact loss of a
path that switches differs by what other experts wrote into earlier keys and values.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from bem.adapters.sites import base_hash
from bem.config import CloningConfig
from bem.control.chunks import chunk_starts
from bem.errors import TrainingError
from bem.files import sha256_json, write_bytes
from bem.routing.action import ActionSpace
from bem.routing.modes import mode
from bem.routing.mounted import Mounted
from bem.routing.oracle import best_path
from bem.training.data import IGNORED, Encoded, collate
from bem.training.losses import answer_logits

Floats = NDArray[np.float32]
FORMAT = 4  # of a trace file; it is part of its key


@dataclass(frozen=True)
class Traces:
    """Losses of conversations, padded to the longest: (rows, chunks, options of a head)."""

    experts: Floats
    ranks: Floats
    """Under each rank budget along `path`."""
    strengths: Floats
    path: NDArray[np.int64]
    """Best expert option of each chunk (rows, chunks)."""
    cost_to_go: Floats
    """Least cost from a chunk on under each expert option; -Q*."""
    answers: NDArray[np.bool_]
    """The chunk predicts answer tokens (rows, chunks)."""
    turns: NDArray[np.bool_]
    """The chunk begins a turn."""
    chunks: NDArray[np.int64]
    """Chunks of each conversation (rows,)."""

    def __len__(self) -> int:
        return len(self.chunks)

    def select(self, rows: NDArray[np.int64] | list[int]) -> Traces:
        """Some of the conversations."""
        return Traces(**{name: value[rows] for name, value in vars(self).items()})


def trace(
    mounted: Mounted,
    rows: Sequence[Encoded],
    pad_id: int,
    config: CloningConfig,
    batch_size: int = 16,
    cache: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    experts_alone: bool = False,
) -> Traces:
    """Trace conversations; a finished trace of the same base, experts, rows and costs is read from `cache`.

    Args:
        cache: an .npz file, written whole or not at all.
        on_progress: called with (passes done, passes in all).
        experts_alone: leave rank budgets and strengths out: no options, (rows, chunks, 0).
    Raises:
        TrainingError: no conversations, or `cache` is damaged.
    """
    if not rows:
        raise TrainingError("no conversations to trace.")
    key = "" if cache is None else _key(mounted, rows, config, experts_alone)
    if cache is not None and (cached := _read_cache(cache, key)) is not None:
        return cached
    space = mounted.router.space
    others = (0, 0) if experts_alone else space.sizes[2:]
    counter = _Counter(space.sizes[0] + max(0, sum(others) - 1), on_progress)
    reader = _LossReader(mounted, rows, pad_id, batch_size, counter)
    experts = np.stack([reader.losses(o, None, None) for o in range(space.sizes[0])], -1)
    oracle = best_path(experts, config.switch_cost, real=reader.real)
    path = np.where(reader.real, oracle.path, -1)
    ranks, strengths = _other_heads(reader, path, space.plain, others)
    traces = Traces(
        experts=experts.astype(np.float32),
        ranks=ranks,
        strengths=strengths,
        path=oracle.path,
        cost_to_go=oracle.cost_to_go.astype(np.float32),
        answers=reader.answers,
        turns=reader.turns,
        chunks=reader.real.sum(1),
    )
    if cache is not None:
        _write_cache(cache, key, traces)
    return traces


def _other_heads(
    reader: _LossReader,
    path: NDArray[np.int64],
    plain: tuple[int, int, int],
    sizes: tuple[int, ...],
) -> tuple[Floats, Floats]:
    """Losses under every rank budget and every strength along a path: (rows, chunks, options) each."""
    losses: dict[tuple[int, int], Floats] = {}  # the plain action is an option of both heads

    def under(rank: int, strength: int) -> Floats:
        if (rank, strength) not in losses:
            losses[rank, strength] = reader.losses(path, rank, strength)
        return losses[rank, strength]

    none = np.zeros((*path.shape, 0), np.float32)
    ranks = [under(rank, plain[2]) for rank in range(sizes[0])]
    strengths = [under(plain[1], strength) for strength in range(sizes[1])]
    return (np.stack(ranks, -1) if ranks else none, np.stack(strengths, -1) if strengths else none)


def target_actions(
    traces: Traces, space: ActionSpace, rank_cost: float, margin: float = 0.0
) -> NDArray[np.int64]:
    """The oracle's action at every chunk (rows, chunks, 4), as if it were decided anew there.

    The span is the longest that neither a change of the path nor a new turn cuts; rank budget and
    strength are those of the next chunk with answer tokens before the path changes, else plain.

    Args:
        rank_cost: of all ranks, in nats; of fewer in proportion.
        margin: another budget or strength than the plain one must save more than this, in nats.
    """
    rows, length = traces.path.shape
    targets = np.empty((rows, length, 4), np.int64)
    share = np.array(space.ranks) / space.ranks[-1]
    plain, spans = space.plain, np.array(space.spans)
    best_rank = _clearly_best(traces.ranks + rank_cost * share, plain[1], margin)
    best_strength = _clearly_best(traces.strengths, plain[2], margin)
    for row in range(rows):
        run, rank, strength = 0, plain[1], plain[2]
        for t in range(traces.chunks[row] - 1, -1, -1):
            last = t + 1 == traces.chunks[row]
            goes_on = not last and traces.path[row, t] == traces.path[row, t + 1]
            run = run + 1 if goes_on and not traces.turns[row, t + 1] else 1
            if not goes_on:
                rank, strength = plain[1], plain[2]
            if traces.answers[row, t]:
                rank, strength = best_rank[row, t], best_strength[row, t]
            span = max(0, int(np.searchsorted(spans, run, side="right")) - 1)
            targets[row, t] = traces.path[row, t], span, rank, strength
    return targets


def _clearly_best(costs: NDArray[np.floating], plain: int, margin: float) -> NDArray[np.int64]:
    """Cheapest option (rows, chunks), the plain one unless that is worse by more than `margin`."""
    saved = costs[..., plain] - costs.min(-1)
    return np.where(saved > margin, costs.argmin(-1), plain)


def best_expert(traces: Traces, switch_cost: float, row: int, chunk: int, current: int) -> int:
    """The oracle's expert option at a chunk when `current` is in force, on its path or off it."""
    cost = traces.cost_to_go[row, chunk] + switch_cost
    cost[current] -= switch_cost
    return int(cost.argmin())


class _Counter:
    def __init__(self, total: int, show: Callable[[int, int], None] | None):
        self.done, self.total, self.show = 0, total, show

    def tick(self) -> None:
        self.done += 1
        if self.show:
            self.show(self.done, self.total)


class _LossReader:
    """Reads the same conversations again and again, under one route after the other."""

    def __init__(
        self, mounted: Mounted, rows: Sequence[Encoded], pad_id: int, size: int, counter: _Counter
    ):
        self.mounted, self.counter = mounted, counter
        self.device = mounted.base.device
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
                losses[chosen] = self._read(batch, number, route)
        self.counter.tick()
        return losses.astype(np.float32)

    def _read(self, batch: dict[str, Tensor], number: Tensor, route: Tensor) -> NDArray[np.float64]:
        inputs = {k: v.to(self.device) for k, v in {**batch, "route": route}.items()}
        logits = answer_logits(self.mounted.model, inputs)
        length = logits.shape[1]
        labels = inputs["labels"][:, -length:]
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2),
            labels[:, 1:],
            ignore_index=IGNORED,
            reduction="none",
        ).cpu()
        counted = (labels[:, 1:] != IGNORED).cpu()
        turn = batch["turn_starts"].long().cumsum(1)[:, -length:-1]
        at = number[:, -length:-1]
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


# --- cache ----------------------------------------------------------------------------------------


def _key(
    mounted: Mounted, rows: Sequence[Encoded], config: CloningConfig, experts_alone: bool
) -> str:
    """Digest of everything that a trace depends on."""
    router, digest = mounted.router, hashlib.sha256()
    for row in rows:
        ids = [*row.input_ids, -1, *row.labels, -1, *map(int, row.turn_starts)]
        digest.update(np.array(ids, np.int64).tobytes())
        digest.update(np.array(row.relevance, np.float64).tobytes())
    return sha256_json(
        {
            "format": FORMAT,
            "base": base_hash(mounted.base),
            "experts": [expert.digest for expert in mounted.experts],
            "loaded": router.available.tolist(),
            "space": repr(router.space),
            "region": repr(router.region),
            "chunk_size": router.chunk_size,
            "switch_cost": config.switch_cost,
            "experts_alone": experts_alone,
            "rows": digest.hexdigest(),
        }
    )


def _read_cache(path: Path, key: str) -> Traces | None:
    """The cached trace if it has this key; None: there is none, or it is another one."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            if str(file["key"]) != key:
                return None
            return Traces(**{field.name: file[field.name] for field in fields(Traces)})
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise TrainingError(
            f"{path} cannot be read ({type(error).__name__}). Delete it to trace anew."
        ) from error


def _write_cache(path: Path, key: str, traces: Traces) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, key=np.array(key), **vars(traces))
    try:
        write_bytes(path, buffer.getbuffer())
    except OSError as error:
        raise TrainingError(f"the traces could not be written to {path}: {error}.") from error
