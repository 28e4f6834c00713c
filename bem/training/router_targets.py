"""Who should answer each turn: by the rows' labels, or by what every expert loses on their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bem.config import CloningConfig
from bem.errors import DataError
from bem.routing.mounted import Mounted
from bem.training.chunk_losses import Floats, chunk_numbers
from bem.training.data import Encoded, collate, encode
from bem.training.routing_rows import BASE, RoutingExample
from bem.training.traces import Traces, trace

LARGEST_REGRET = 1.0
"""What answering with another expert than the label's counts, in nats per answer token; and at most this
much counts of what was measured."""
SOFTNESS = 0.1
"""Nats: an expert that loses this much more than the best one is wanted e times less."""
UNKNOWN = -1


@dataclass(frozen=True)
class Targets:
    """Of each turn of each row, padded to the longest: (rows, turns)."""

    best: NDArray[np.int64]
    """Expert option, UNKNOWN where nobody says."""
    wanted: Floats
    """Probability that each option should have (rows, turns, options)."""
    losses: Floats
    """Nats per answer token under each option (rows, turns, options); NaN where not measured."""
    starts: NDArray[np.int64]
    """Chunk that begins each turn, from 1; 0: no such turn."""

    def select(self, rows: Sequence[int]) -> Targets:
        """Some of the rows."""
        return Targets(**{name: value[list(rows)] for name, value in vars(self).items()})

    def regrets(self, clipped: bool = True) -> Floats:
        """What each option loses beyond the best one; by the label where there is one."""
        measured = self.losses - np.nanmin(self.losses, -1, keepdims=True, initial=np.inf)
        options = np.arange(self.wanted.shape[-1])
        labelled = np.where(options == self.best[..., None], 0.0, LARGEST_REGRET)
        hard = (self.wanted.max(-1) == 1.0)[..., None] | np.isnan(measured)
        found = np.where(hard, labelled, measured)
        return np.minimum(found, LARGEST_REGRET) if clipped else found


def prompts_of(
    examples: Sequence[RoutingExample], tokenizer: Any, max_length: int
) -> list[Encoded]:
    """The conversations up to the answer to come, which begins a turn at the last token of the prompt."""
    found = []
    for example in examples:
        prompt = encode(example.row, tokenizer, max_length, with_answer=False)
        prompt.turn_starts[-1] = True
        found.append(prompt)
    return found


def answered_rows(
    examples: Sequence[RoutingExample], tokenizer: Any, max_length: int, chosen: Sequence[int]
) -> list[Encoded]:
    """Some of the conversations with their answers."""
    return [encode(examples[i].row, tokenizer, max_length) for i in chosen]


def turn_losses(
    mounted: Mounted,
    rows: Sequence[Encoded],
    pad_id: int,
    batch_size: int,
    on_progress: Callable[[int, int], None],
    cache: Path | None = None,
) -> list[Floats]:
    """Nats per answer token of each turn under each option, of each row (turns, options).

    Args:
        cache: file that keeps them, for the same base, experts and rows.
    """
    traces = trace(
        mounted, rows, pad_id, CloningConfig(), batch_size, cache, on_progress, experts_alone=True
    )
    return [per_turn(traces.experts[i], traces.turns[i]) for i in range(len(rows))]


def per_turn(losses: Floats, turns: NDArray[np.bool_]) -> Floats:
    """Sums over the chunks of each turn: (chunks, ...) to (turns, ...)."""
    number = turns.cumsum()
    summed = np.zeros((int(turns.sum()) + 1, *losses.shape[1:]), np.float32)
    np.add.at(summed, number, losses)
    return summed[1:]


def targets_of(
    examples: Sequence[RoutingExample],
    prompts: Sequence[Encoded],
    losses: Sequence[Floats | None],
    experts: Sequence[str],
    pad_id: int,
    chunk_size: int,
) -> Targets:
    """Put together what labels and losses say.

    A conversation that was cut, or whose earlier turns a chat template rewrites, has fewer turns than
    labels: those of the last turns count.

    Args:
        losses: of each row, see `turn_losses`; None: not measured.
        experts: names, in the order of their options from 1.
    """
    option = {BASE: 0, **{name: o for o, name in enumerate(experts, 1)}}
    starts = [_turn_chunks(prompt, pad_id, chunk_size) for prompt in prompts]
    shape = len(prompts), max(map(len, starts))
    found = Targets(
        best=np.full(shape, UNKNOWN, np.int64),
        wanted=np.zeros((*shape, len(option)), np.float32),
        losses=np.full((*shape, len(option)), np.nan, np.float32),
        starts=np.zeros(shape, np.int64),
    )
    for i, (example, start, loss) in enumerate(zip(examples, starts, losses, strict=True)):
        n = len(start)
        found.starts[i, :n] = start
        if loss is not None:
            kept = loss[-n:]
            found.losses[i, n - len(kept) : n] = kept
        for turn, label in zip(range(n - 1, -1, -1), reversed(example.labels), strict=False):
            if label is not None:
                found.best[i, turn] = option[label]
                found.wanted[i, turn, option[label]] = 1.0
        if loss is not None and not example.labels:
            judged = found.losses[i, n - len(kept) : n]
            found.best[i, n - len(kept) : n] = judged.argmin(-1)
            soft = torch.from_numpy(-judged / SOFTNESS).softmax(-1)
            found.wanted[i, n - len(kept) : n] = soft.numpy()
    return found


def _turn_chunks(prompt: Encoded, pad_id: int, chunk_size: int) -> list[int]:
    numbers = chunk_numbers(collate([replace(prompt, route=[])], pad_id), chunk_size)[0]
    return numbers[torch.tensor(prompt.turn_starts)].tolist()


def as_traces(targets: Targets) -> Traces:
    """The targets as traces of conversations whose answers all lie in the chunk that begins them."""
    rows, turns = (targets.best != UNKNOWN).nonzero()
    chunks = targets.starts.max(1)
    shape, options = (len(chunks), int(chunks.max())), targets.wanted.shape[-1]
    at = targets.starts[rows, turns] - 1
    experts = np.zeros((*shape, options), np.float32)
    experts[rows, at] = targets.regrets()[rows, turns]
    path, answers = np.zeros(shape, np.int64), np.zeros(shape, bool)
    path[rows, at], answers[rows, at] = targets.best[rows, turns], True
    nothing = np.zeros((*shape, 0), np.float32)
    return Traces(experts, nothing, nothing, path, experts, answers, answers, chunks)


def document_of(example: RoutingExample) -> Any:
    """What rows that must not be torn apart share: their `group`, else the same words."""
    row = example.row
    return row.group if row.group != row.id else (row.system, row.history, row.prompt)


def check_apart(rows: Sequence[RoutingExample], test: Sequence[RoutingExample]) -> None:
    """No document is learned from and judged on.

    Raises:
        DataError: how many rows of `test` are, and the first of them.
    """
    learned = {document_of(example): example.row.id for example in reversed(rows)}
    both = [example for example in test if document_of(example) in learned]
    if both:
        raise DataError(
            f"{len(both)} of the {len(test)} held-out rows are also among the examples to learn from (by `group`, "
            f"or by the same words): row {both[0].row.id!r} is there as {learned[document_of(both[0])]!r}. Numbers "
            "on rows that were learned say nothing: take them out of one side."
        )


def check_left(best: Sequence[int], asked: Sequence[int], names: Sequence[str]) -> None:
    """Enough rows are left to learn from that some of them can be left out.

    Args:
        best: option of the last turn of each row that teaches.
        asked: options that a label names.
        names: of the options.
    Raises:
        DataError: names an option with too few rows.
    """
    counts = {option: list(best).count(option) for option in {*best, *asked}}
    few = [option for option in asked if counts[option] < 2]
    if few or max(counts.values()) < 2:
        option = few[0] if few else min(counts)
        raise DataError(
            f"{counts[option]} of the {len(best)} rows that are left to learn from is for {names[option]!r}: at least 2 "
            "are needed. Hold out less, or add rows."
        )


def split_rows(
    examples: Sequence[RoutingExample], best: Sequence[int], share: float, seed: int
) -> NDArray[np.bool_]:
    """Which rows are held out: of every option a seeded share of its documents, at least one of two.

    Rows of one document (`group`, else the same words) are on one side; a document counts for its first
    row's option.

    Raises:
        DataError: every option's rows are one document, so that nothing can be held out.
    """
    documents: dict[Any, list[int]] = {}
    for i, example in enumerate(examples):
        documents.setdefault(document_of(example), []).append(i)
    rng = np.random.default_rng([seed, 31])
    out = np.zeros(len(examples), bool)
    for option in sorted(set(best)):
        own = [rows for rows in documents.values() if best[rows[0]] == option]
        taken = max(1, round(share * len(own))) if len(own) > 1 else 0
        for at in rng.permutation(len(own))[: min(taken, len(own) - 1)]:
            out[own[at]] = True
    if not out.any():
        raise DataError(
            f"nothing can be held out: the {len(examples)} rows are {len(documents)} documents (by `group`, or "
            "by the same words), one for each expert. Add rows that differ."
        )
    return out


def folds_of(rows: Sequence[int], best: Sequence[int], most: int, seed: int) -> Tensor:
    """Number of each turn's fold: turns of one row share it, options are spread evenly.

    Args:
        rows, best: of each turn.
        most: folds at most; fewer where an option has fewer rows.
    """
    first = {row: option for row, option in zip(reversed(rows), reversed(best), strict=True)}
    counts = np.bincount(list(first.values()))
    n = int(min(most, max(2, counts[counts > 0].min())))
    rng, of_row = np.random.default_rng([seed, 37]), {}
    for option in sorted(set(first.values())):
        own = [row for row in sorted(first) if first[row] == option]
        for place, at in enumerate(rng.permutation(len(own))):
            of_row[own[at]] = place % n
    return torch.tensor([of_row[row] for row in rows])


def check_enough(
    best: Sequence[int], asked: Sequence[int], names: Sequence[str], fewest: int
) -> None:
    """Every option that labels ask for has rows enough, and more than one is wanted.

    Args:
        best: option of each row's last turn.
        asked: options that a label names; what the oracle alone finds may be rare.
        names: of the options.
    Raises:
        DataError: names the option, its rows and the least number.
    """
    counts = {option: list(best).count(option) for option in {*best, *asked}}
    listed = ", ".join(f"{names[o]} {n}" for o, n in sorted(counts.items()))
    for option in asked:
        if counts[option] < fewest:
            raise DataError(
                f"{names[option]!r} is right for {counts[option]} rows, fewer than {fewest}. Rows: {listed}. Some 20 "
                "of a skill are enough to begin with: add rows, or leave the expert out."
            )
    if len(set(best)) < 2:
        raise DataError(f"all rows go to one expert ({listed}): there is nothing to choose.")
