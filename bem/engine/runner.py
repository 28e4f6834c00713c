"""One forward pass over sequences that stand at different places."""

from __future__ import annotations

from collections.abc import Sequence as Row
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bem.adapters.names import innermost
from bem.control.wiring import Acting
from bem.engine.mixed import can_mix, mixed
from bem.engine.sampler import log_probabilities
from bem.engine.sequence import Sequence
from bem.engine.slab import Place, Slab, SlotLayer
from bem.routing.pack import Pack
from bem.safety.protect import knob_of

HOLD = -1
"""In a route: the action before goes on."""


@dataclass
class Piece:
    """The next tokens of one sequence that a pass reads."""

    sequence: Sequence
    tokens: int

    @property
    def start(self) -> int:
        """Position of its first token."""
        return self.sequence.read

    @property
    def ids(self) -> list[int]:
        """Its tokens."""
        return self.sequence.ids[self.start : self.start + self.tokens]

    @property
    def turns(self) -> list[bool]:
        """Which of them start a turn."""
        spans = self.sequence.spans
        assert spans is not None
        return [p in spans.turns for p in range(self.start, self.start + self.tokens)]

    @property
    def scored(self) -> range:
        """Positions of the prompt whose log-probabilities this piece gives, of one token later."""
        sequence = self.sequence
        if not sequence.scores:
            return range(0)
        first = max(self.start, sequence.request.prompt_logprobs_from - 1)
        return range(first, min(self.start + self.tokens, sequence.prompt - 1))

    @property
    def begins_chunk(self) -> bool:
        """Does its first token begin one?"""
        spans = self.sequence.spans
        assert spans is not None
        return spans.filled(self.start) >= spans.size

    def route(self) -> list[int]:
        """Of each token: the request's expert in the prompt, and that it goes on behind it."""
        option = self.sequence.route
        assert option is not None
        positions = range(self.start, self.start + self.tokens)
        return [option if p < self.sequence.prompt else HOLD for p in positions]


class Runner:
    """Runs a model on pieces; their keys, values and control go to the slab and the control state."""

    def __init__(
        self, model: Any, slab: Slab, control: SlotLayer | None, pad_id: int, mask_dtype: Any
    ):
        """mask_dtype: bool, or the floating point type in which attention adds its mask."""
        self.model, self.slab, self.control = model, slab, control
        self.pad_id, self.mask_dtype = pad_id, mask_dtype
        self.passes = 0
        self._mixed: tuple[list[Acting | None], Acting | None] = ([], None)

    def run(self, pieces: Row[Piece]) -> Tensor:
        """Logits behind the last token of each piece [pieces, vocabulary], in float32.

        Pieces that cannot share a pass (a route given or not, a prompt that is scored or not) run one after another.
        """
        groups: list[list[int]] = []
        for i, piece in enumerate(pieces):
            fits = (g for g in groups if _share(pieces[g[0]], piece))
            group = next(fits, None)
            if group is None:
                groups.append(group := [])
            group.append(i)
        logits: list[Tensor | None] = [None] * len(pieces)
        for group in groups:
            for i, row in zip(group, self._pass([pieces[i] for i in group]), strict=True):
                logits[i] = row
        return torch.stack(logits)  # pyright: ignore[reportArgumentType]

    def _pass(self, pieces: Row[Piece]) -> Tensor:
        pieces = list(pieces)
        order = sorted(range(len(pieces)), key=lambda i: pieces[i].sequence.slot)
        rows = [pieces[i] for i in order]
        device = self.model.device
        place = Place(
            [p.sequence.slot for p in rows],
            [p.start for p in rows],
            [p.tokens for p in rows],
            device,
        )
        arguments = self._arguments(rows, place)
        cache = self.slab.cache(place, self.control)
        with self._kappas(rows, device):
            output = self.model(**arguments, past_key_values=cache, use_cache=True)
        self.passes += 1
        last = torch.tensor([p.tokens - 1 for p in rows], device=device)
        kept = arguments["logits_to_keep"]
        if isinstance(kept, Tensor):
            at = torch.searchsorted(kept, last)
        else:  # the last one, or all
            at = torch.zeros_like(last) if kept else last
        logits = output.logits[torch.arange(len(rows), device=device), at].float()
        for row, piece in enumerate(rows):
            _score(piece, output.logits[row])
            piece.sequence.read += piece.tokens
        back = torch.empty(len(order), dtype=torch.long, device=device)
        back[torch.tensor(order, device=device)] = torch.arange(len(order), device=device)
        return logits if order == sorted(order) else logits.index_select(0, back)

    def _kappas(self, rows: list[Piece], device: torch.device) -> AbstractContextManager[None]:
        """Each row under the kappa that its request raised."""
        wanted = [row.sequence.request.kappa for row in rows]
        knob = knob_of(innermost(self.model)) if any(wanted) else None
        if knob is None:
            return nullcontext()
        return knob.holding(torch.tensor([k or 0.0 for k in wanted], device=device))

    def _arguments(self, rows: list[Piece], place: Place) -> dict[str, Any]:
        device, width = place.device, place.width
        ids = [p.ids + [self.pad_id] * (width - p.tokens) for p in rows]
        lasts = sorted({p.tokens - 1 for p in rows})
        keep: int | Tensor = 1 if lasts == [width - 1] else torch.tensor(lasts, device=device)
        if any(p.scored for p in rows):
            keep = 0  # all
        arguments: dict[str, Any] = {
            "input_ids": torch.tensor(ids, device=device),
            "position_ids": place.positions,
            "attention_mask": None if place.even else self._mask(place),
            "logits_to_keep": keep,
        }
        if self.control is not None:
            self._control_begins(rows, place, self.control)
            arguments |= self._told(rows, width, device)
        return arguments

    def _control_begins(self, rows: list[Piece], place: Place, control: SlotLayer) -> None:
        for piece in rows:
            assert piece.sequence.spans is not None
            control.filled[piece.sequence.control] = piece.sequence.spans.filled(piece.start)
        control.begins(place, [p.sequence.control for p in rows], self._acting(rows, place))

    def _acting(self, rows: list[Piece], place: Place) -> Acting | None:
        """What acts on these rows; the same object as in the pass before, while it is the same."""
        acting = [row.sequence.acts and row.sequence.acts.acting for row in rows]
        if all(one is acting[0] for one in acting):
            if place.width == 1:  # nobody runs under another one: it need not be held
                self._mixed = [], None
            return acting[0]
        last, mix = self._mixed
        if len(last) != len(acting) or any(a is not b for a, b in zip(last, acting, strict=True)):
            packs = [pack for pack in acting if isinstance(pack, Pack)]
            mix = mixed(packs, place.device)
            self._mixed = acting, mix
        return mix

    def _told(self, rows: list[Piece], width: int, device: torch.device) -> dict[str, Any]:
        """Turn starts and route, where they say something."""
        told: dict[str, Any] = {}
        turns = [p.turns + [False] * (width - p.tokens) for p in rows]
        if any(map(any, turns)):
            told["turn_starts"] = torch.tensor(turns, device=device)
        routed = rows[0].sequence.route is not None
        if routed and (width > 1 or any(p.begins_chunk for p in rows) or told):
            route = [p.route() + [HOLD] * (width - p.tokens) for p in rows]
            told["route"] = torch.tensor(route, device=device)
        return told

    def _mask(self, place: Place) -> Tensor:
        mask = place.mask()
        if self.mask_dtype is torch.bool:
            return mask
        least = torch.finfo(self.mask_dtype).min
        return torch.zeros_like(mask, dtype=self.mask_dtype).masked_fill(~mask, least)


def _share(one: Piece, other: Piece) -> bool:
    """Can both be in one pass?"""
    a, b = one.sequence, other.sequence
    assert a.acts is not None and b.acts is not None
    if (a.route is None) != (b.route is None) or bool(one.scored) != bool(other.scored):
        return False
    x, y = a.acts.acting, b.acts.acting
    return x is y or (x is not None and y is not None and can_mix(x, y))


def _score(piece: Piece, logits: Tensor) -> None:
    """Log-probabilities of the prompt's tokens go to its sequence; logits: of all its positions."""
    scored, sequence = piece.scored, piece.sequence
    if not scored:
        return
    wanted = sequence.request.prompt_logprobs
    assert wanted is not None
    tokens = sequence.ids[scored.start + 1 : scored.stop + 1]
    of = logits[scored.start - piece.start : scored.stop - piece.start]
    sequence.prompt_logprobs += log_probabilities(of, tokens, wanted)
