"""Hidden states that enter one early layer, without the cost of the layers above."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bem.adapters.sites import find_sites
from bem.training.data import Encoded, collate
from bem.training.losses import arguments_of


@torch.no_grad()
def hidden_states(
    base: Any, rows: Sequence[Encoded], layer: int, pad_id: int, batch_size: int = 16
) -> Iterator[tuple[int, Tensor]]:
    """(row, hidden states (tokens, d_model) that enter a layer) of each row, the shortest first."""
    entered: list[Tensor] = []

    def catch(_: Any, args: tuple, given: dict) -> None:
        entered.append(args[0] if args else given["hidden_states"])

    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    block = base.get_submodule(find_sites(base).blocks[layer])
    for at in range(0, len(rows), batch_size):
        chosen = order[at : at + batch_size]
        batch = collate([replace(rows[i], route=[]) for i in chosen], pad_id)
        handle = block.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            run_up_to(base, base, layer, batch, ("input_ids", "attention_mask", "position_ids"))
        finally:
            handle.remove()
        states = entered.pop()
        yield from ((i, states[r, -len(rows[i]) :]) for r, i in enumerate(chosen))


def run_up_to(
    model: Any, base: Any, layer: int, batch: dict[str, Tensor], names: Sequence[str]
) -> None:
    """One forward pass through the blocks 0 to `layer` alone, for what hooks see of it.

    Args:
        model: what is called: the base, or a `PeftModel` around it.
        names: entries of the batch that it is given; position_ids only if it takes them.
    """
    takes = arguments_of(model)
    given = [n for n in names if n in batch and (n != "position_ids" or n in takes)]
    inputs: dict[str, Any] = {name: batch[name].to(base.device) for name in given}
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"] = 1
    with _without_blocks_above(base, layer):
        model(**inputs, use_cache=False)


@contextmanager
def _without_blocks_above(base: Any, layer: int) -> Iterator[None]:
    """The model's list of blocks ends with block `layer` inside, and is whole again afterwards."""
    blocks = base.get_submodule(find_sites(base).blocks[layer].rpartition(".")[0])
    above = list(blocks[layer + 1 :])
    del blocks[layer + 1 :]
    try:
        yield
    finally:
        blocks.extend(above)


class LowerBlocks:
    """The blocks below one layer, for forward passes over the same tokens again and again: no adapter acts there
    (what is adapted lies above what the router reads), so they are read once."""

    def __init__(self, base: Any, layer: int):
        """layer: the lowest that may be adapted."""
        self.blocks = [base.get_submodule(path) for path in find_sites(base).blocks[:layer]]

    @contextmanager
    def giving(self, known: Any) -> Iterator[list[Any]]:
        """Forward passes inside.

        Args:
            known: what the uppermost of them gave to these tokens, as a pass noted it; None: nothing is known, and
                the next pass computes them.
        Yields:
            what it gives, pass by pass.
        """
        given: list[Any] = []
        computes = self.blocks[-1].forward if self.blocks else None

        def noted(*args: Any, **kwargs: Any) -> Any:
            assert computes is not None
            given.append(_copied(computes(*args, **kwargs)))  # who reads it may write to it
            return _copied(given[-1])

        # without a hook: those of others see what a block gives, known or not
        changed = self.blocks[-1:] if known is None else self.blocks
        before = [block.__dict__.get("forward") for block in changed]
        for block in changed:
            block.forward = noted if known is None else lambda *_, **__: _copied(known)
        try:
            yield given
        finally:
            for block, own in zip(changed, before, strict=True):
                del block.forward
                if own is not None:  # of a library that had put it there (accelerate)
                    block.forward = own


def _copied(out: Any) -> Any:
    """A block's hidden states, with whatever else it gives."""
    return (out[0].clone(), *out[1:]) if isinstance(out, tuple) else out.clone()
