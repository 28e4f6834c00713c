"""Chunks that were read before: taken out of a `ControlState`, and put back for another sequence.

What is taken is all that the next chunk needs to know, so that a sequence can go on behind a chunk that
somebody else read, without any forward pass over it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bem.control.controller import Running
from bem.control.state import ControlState
from bem.errors import CacheError


def after_chunk(state: ControlState, slot: int, chunk: int, start: int, stop: int) -> Running:
    """What was running when a chunk was read to its end: one row, of a sequence without padding.

    Args:
        chunk: its number, from 1.
        start, stop: its columns.
    """
    done, sums = state.chunk_sums[slot, chunk], state.running.sums[slot]
    if chunk < int(state.running.number[slot]):
        sums = state.chunk_sums[slot, chunk + 1] - done
    whole = torch.tensor([[stop - start], [start], [chunk]], device=state.device)
    return Running(
        sums=sums[None].clone(),
        count=whole[0],
        done_sums=done[None].clone(),
        done_count=whole[1],
        number=whole[2],
        control=state.controls[slot, chunk][None].clone(),
    )


def restore(state: ControlState, slot: int, chunks: Sequence[Running]) -> None:
    """An empty sequence goes on behind chunks that were read elsewhere.

    Args:
        chunks: `after_chunk` of each, from the first on.
    Raises:
        CacheError: the sequence is not empty.
    """
    if state.columns[slot] or not chunks:
        raise CacheError(
            f"slot {slot} holds {state.columns[slot]} tokens, {len(chunks)} chunks are to be put before them: only "
            "an empty sequence goes on behind chunks."
        )
    last = chunks[-1]
    state.columns[slot] = state.oldest[slot] = int(last.done_count[0] + last.count[0])
    state.turns[slot] = len(chunks) + state.columns[slot] // -state.layout.chunk_size
    state.make_room([slot])
    for number, running in enumerate(chunks, 1):
        state.starts[slot, number] = running.done_count[0]
        state.chunk_sums[slot, number] = running.done_sums[0]
        state.controls[slot, number] = running.control[0]
    for name, array in vars(state.running).items():
        array[slot] = getattr(last, name)[0]
