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
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bem.adapters.version import base_digest
from bem.config import CloningConfig
from bem.errors import TrainingError
from bem.files import sha256_json, write_bytes
from bem.routing.action import ActionSpace
from bem.routing.mounted import Mounted
from bem.routing.oracle import best_path
from bem.training.chunk_losses import Floats, LossReader
from bem.training.data import Encoded

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
    sizes = mounted.router.space.sizes
    others = (0, 0) if experts_alone else sizes[2:]
    passes = _counted(sizes[0] + max(0, sum(others) - 1), on_progress)

    def read() -> Traces:
        reader = LossReader(mounted, rows, pad_id, batch_size, passes)
        return _traced(reader, mounted.router.space, others, config.switch_cost)

    if cache is None:
        return read()
    key = _key(mounted, rows, config, experts_alone)
    if (cached := _read_cache(cache, key)) is not None:
        return cached
    traces = read()
    _write_cache(cache, key, traces)
    return traces


def _traced(
    reader: LossReader, space: ActionSpace, others: tuple[int, ...], switch_cost: float
) -> Traces:
    """others: options of rank budget and strength that are read."""
    experts = np.stack([reader.losses(o, None, None) for o in range(space.sizes[0])], -1)
    oracle = best_path(experts, switch_cost, real=reader.real)
    path = np.where(reader.real, oracle.path, -1)
    ranks, strengths = _other_heads(reader, path, space.plain, others)
    return Traces(
        experts=experts.astype(np.float32),
        ranks=ranks,
        strengths=strengths,
        path=oracle.path,
        cost_to_go=oracle.cost_to_go.astype(np.float32),
        answers=reader.answers,
        turns=reader.turns,
        chunks=reader.real.sum(1),
    )


def _other_heads(
    reader: LossReader,
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


def _counted(total: int, show: Callable[[int, int], None] | None) -> Callable[[], None]:
    """Tells `show` how many passes are done each time it is called."""
    done = itertools.count(1)
    return lambda: show(next(done), total) if show else None


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


# --- cache ----------------------------------------------------------------------------------------


def _key(
    mounted: Mounted, rows: Sequence[Encoded], config: CloningConfig, experts_alone: bool
) -> str:
    """Digest of everything that a trace depends on."""
    router, digest = mounted.router, hashlib.sha256()
    for row in rows:
        ids = [*row.input_ids, -1, *row.labels, -1, *map(int, row.turn_starts)]
        digest.update(np.array(ids, np.int64).tobytes())
        digest.update(np.array([*row.relevance, *row.vision], np.float64).tobytes())
    return sha256_json(
        {
            "format": FORMAT,
            "base": base_digest(mounted.base),
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
