"""What happens during a forward pass: the router layer's input becomes control, the sites use it.

One `Runtime` per model. It holds nothing of a sequence (that lives with the cache) but what passes
from layer to layer while one forward pass runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from bem.adapters.queries import Queries
from bem.adapters.sites import clean_name
from bem.control.cache import ControlLayer, control_layer
from bem.control.chunks import slots_needed, turns_from_labels
from bem.control.controller import (
    ChunkReader,
    Routed,
    evidence_of_chunks,
    with_control,
)
from bem.errors import AttachError, CacheError, TrainingError


@dataclass
class Wiring:
    """How one adapter hangs together."""

    name: str
    layer: int  # router layer
    depth: int  # decoder blocks of the model
    controller: ChunkReader
    members: list[Any]  # modules with a control, in order
    films: dict[int, int]  # decoder block -> index into `members`
    shapings: dict[int, int]  # decoder block whose queries are scaled -> index into `members`
    queries: dict[int, Queries]  # the same blocks -> where their queries come out

    @property
    def widths(self) -> list[int]:
        """Control floats of each member; the controller's own tail comes last."""
        widths = [member.control_width for member in self.members]
        return [*widths, n] if (n := self.controller.tail_width) else widths

    @property
    def applied_width(self) -> int:
        """Control floats that act on the model: all but the controller's own tail."""
        return sum(member.control_width for member in self.members)


class _PerToken:
    """Control per slot, spread over the tokens of one member at a time: a prefill never holds all."""

    def __init__(self, slots: tuple[Tensor, ...], slot: Tensor):
        self.slots, self.shape = slots, slot.shape
        rows = torch.arange(len(slot), device=slot.device)[:, None] * slots[0].shape[1]
        self.rows = (slot + rows).flatten()

    def __getitem__(self, index: int) -> Tensor:
        # whole rows: ten times as fast as a gather, which looks up every number by itself
        return self.slots[index].flatten(0, 1).index_select(0, self.rows).unflatten(0, self.shape)


class _NoControl:
    def __getitem__(self, index: int) -> Tensor:
        raise AttachError(
            "No control was computed: call the whole model, not a part of it above the router layer."
        )


class Runtime:
    """Carries control from the router layer to the sites during one forward pass."""

    def __init__(self) -> None:
        self.wiring: Wiring | None = None  # the active adapter, if it has a controller
        self.parts: Any = (
            _NoControl()
        )  # control per token of each member, or of the chunk when decoding
        self.serial = 0  # forward passes begun
        self.checkpointing = False
        self.generating = False
        self.prompt_end: int | None = None  # column behind the prompt while `generate` runs
        self.plans: dict[str, Any] = {}  # adapter name -> where its modules go (see peft_method)
        self.handles: list[Any] = []
        self._mask: Tensor | None = None
        self._turns: Tensor | None = None
        self._evidence: Tensor | None = None
        self._route: Tensor | None = None
        self._spread: dict[int, tuple[Tensor, Tensor]] = {}
        self.prompt_turns: Tensor | None = None  # what `generate` was given
        self.prompt_evidence: Tensor | None = None
        self.prompt_route: Tensor | None = None
        self._head_input: Tensor | None = None

    # --- hooks ------------------------------------------------------------------------------------

    def install(
        self,
        model: nn.Module,
        wirings: list[Wiring],
        blocks: list[nn.Module],
        attn_out: dict[int, nn.Module],
    ) -> None:
        """(Re)place the hooks that the given adapters need."""
        self.remove()
        self.handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for layer in sorted({w.layer for w in wirings}):
            hook = partial(self._enter, layer)
            self.handles.append(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True))
            reads_heads = any(w.layer == layer and w.controller.n_heads for w in wirings)
            if reads_heads and layer - 1 in attn_out:
                self.handles.append(attn_out[layer - 1].register_forward_pre_hook(self._listen))
        for block in sorted({block for w in wirings for block in w.films}):
            self.handles.append(blocks[block].register_forward_hook(partial(self._modulate, block)))
        places = {block: q for w in wirings for block, q in w.queries.items()}
        modules = {clean_name(n): m for n, m in model.named_modules()} if places else {}
        for block, queries in sorted(places.items()):
            hook = partial(self._shape, block)
            self.handles.append(modules[queries.name].register_forward_hook(hook))

    def remove(self) -> None:
        """Take all hooks off the model."""
        self._spread = {}
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Note padding, turn starts, evidence and route; all but the first are ours and go no further."""
        turns, evidence = kwargs.pop("turn_starts", None), kwargs.pop("evidence", None)
        route = kwargs.pop("route", None)
        if self.wiring is None:
            return args, kwargs
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise AttachError(
                "BEM needs the 2-D attention mask (batch, tokens): it tells padding from text."
            )
        if turns is None and kwargs.get("labels") is not None:
            turns = turns_from_labels(kwargs["labels"])
        self._mask, self._turns, self._evidence, self._route = mask, turns, evidence, route
        self._head_input = None
        self.parts = _NoControl()
        self.serial += 1
        return args, kwargs

    def _listen(self, attn_out: nn.Module, args: tuple) -> None:
        self._head_input = args[0]

    def _modulate(self, block: int, module: nn.Module, args: tuple, output: Any) -> Any:
        wiring = self.wiring
        if wiring is None or block not in wiring.films:
            return output
        index = wiring.films[block]
        film, control = wiring.members[index], self.parts[index]
        if isinstance(output, tuple):
            return film.modulate(output[0], control), *output[1:]
        return film.modulate(output, control)

    def _shape(self, block: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        wiring = self.wiring
        if wiring is None or block not in wiring.shapings:
            return output
        control = self.parts[wiring.shapings[block]]
        known, spread = self._spread.get(block, (None, None))
        if known is not control or spread is None:  # while a chunk is decoded, both stay
            spread = wiring.queries[block].spread(control, output)
            if control.shape[1] == 1:
                self._spread[block] = (control, spread)
        return output * spread

    def _enter(self, layer: int, block: Any, args: tuple, kwargs: dict) -> None:
        """Before the router layer runs: turn what was read so far into control for every site above."""
        wiring = self.wiring
        if wiring is None or wiring.layer != layer:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        self.checkpointing = (
            bool(getattr(block, "gradient_checkpointing", False)) and block.training
        )
        if self.checkpointing:
            _refuse_reentrant(block)
        cache = None if self.checkpointing else _find_cache(args, kwargs)
        if cache is None:
            self._route_piece(wiring, hidden, None)
        else:
            self._route_cached(wiring, hidden, cache)  # pyright: ignore

    @torch.compiler.disable
    def _route_cached(self, wiring: Wiring, hidden: Tensor, cache: Cache) -> None:
        state = control_layer(cache, wiring)
        held = cache.get_seq_length(wiring.layer)
        if isinstance(held, int) and held != state.columns:
            raise CacheError(
                f"the cache holds {held} tokens of which adapter {wiring.name!r} has seen {state.columns}. "
                "It was filled without the adapter or cut behind its back: start with a new cache."
            )
        if self._stays_in_chunk(wiring, hidden, state):
            self.parts = state.parts
            with torch.autocast(hidden.device.type, enabled=False):
                state.append_token(wiring.controller.features(hidden, self._head_input))
        else:
            self._route_piece(wiring, hidden, state)

    def _stays_in_chunk(self, wiring: Wiring, hidden: Tensor, state: ControlLayer) -> bool:
        """Is this one decoded token, inside the running chunk of every row? Then nothing is computed."""
        if hidden.shape[1] != 1 or state.running is None or self._turns is not None:
            return False
        if self._mask is not None and not self.generating:
            return False  # the mask may declare padding
        if self.prompt_end is not None and state.columns < self.prompt_end:
            return False
        if state.left is None:
            run = state.running
            left = torch.where(run.number > 0, wiring.controller.chunk_size - run.count, 0)
            state.left = int(left.min())
            state.parts = run.control[:, None].to(hidden.dtype).split(wiring.widths, -1)
        return state.left > 0

    def _route_piece(self, wiring: Wiring, hidden: Tensor, state: ControlLayer | None) -> None:
        controller, (batch, tokens) = wiring.controller, hidden.shape[:2]
        before = state.settle() if state is not None else None
        if before is None:
            before = controller.start(batch, sum(wiring.widths), hidden.device)
        valid = self._valid(batch, tokens, hidden.device)
        offset = state.columns if state is not None else 0
        turns = self._turn_starts(batch, tokens, offset, hidden.device)
        route = self._given_route(batch, tokens, offset, hidden.device)
        slots = slots_needed(tokens, turns, controller.chunk_size)
        with torch.autocast(hidden.device.type, enabled=False):
            features = controller.features(hidden, self._head_input)
            pooled = controller.pool(features, valid, turns, before, slots)
            routed = self._decide(wiring, pooled, turns, route)
        self.parts = _PerToken(
            routed.control.to(hidden.dtype).split(wiring.widths, -1), routed.slot
        )
        if state is not None:
            state.append(routed, features, valid)

    def _decide(
        self, wiring: Wiring, pooled: Routed, turns: Tensor | None, route: Tensor | None
    ) -> Routed:
        width, evidence = wiring.controller.n_evidence, None
        if width:
            batch, tokens = pooled.slot.shape
            given = self._given_evidence(batch, tokens, width, pooled.slot.device)
            evidence = evidence_of_chunks(given, pooled, width)
            if wiring.controller.blind:
                evidence = torch.zeros_like(evidence)
        control = wiring.controller.decide(wiring.members, pooled, turns, evidence, route)
        return with_control(pooled, control)

    def _given_route(
        self, batch: int, tokens: int, offset: int, device: torch.device
    ) -> Tensor | None:
        """The caller's route for this piece, int (batch, tokens, ...); -1 behind the prompt: hold."""
        if self._route is not None:
            if self._route.shape[:2] != (batch, tokens):
                raise AttachError(
                    f"route {tuple(self._route.shape)} must begin with the shape of the tokens: "
                    f"{(batch, tokens)}."
                )
            return self._route.to(device)
        if self.prompt_route is None:
            return None
        known = self.prompt_route[:, offset : offset + tokens].to(device)
        known = known.repeat_interleave(max(1, batch // len(known)), 0)
        behind = known.new_full((batch, tokens - known.shape[1], *known.shape[2:]), -1)
        return torch.cat([known, behind], 1)

    def _given_evidence(
        self, batch: int, tokens: int, width: int, device: torch.device
    ) -> Tensor | None:
        """Evidence of this piece as the caller gave it, one row per sequence (beams repeat rows)."""
        given = self._evidence
        if given is None and self.prompt_evidence is not None:
            given = self.prompt_evidence
            given = given.repeat_interleave(max(1, batch // len(given)), 0)
        if given is None:
            return None
        given = _features(given)
        if given.shape not in ((batch, width), (batch, tokens, width)):
            raise AttachError(
                f"evidence {tuple(given.shape)} must be (batch, features) {(batch, width)} or (batch, tokens, "
                f"features) {(batch, tokens, width)}; features are bem.config.EVIDENCE_FEATURES."
            )
        return given.to(device)

    def _valid(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        if self._mask is None:
            return torch.ones(batch, tokens, dtype=torch.bool, device=device)
        return self._mask[:, -tokens:].bool()

    def _turn_starts(
        self, batch: int, tokens: int, offset: int, device: torch.device
    ) -> Tensor | None:
        """Turn starts of this piece, from the caller, the labels or the end of the prompt."""
        turns = self._turns
        if turns is not None and turns.shape != (batch, tokens):
            raise AttachError(
                f"turn_starts {tuple(turns.shape)} must have the shape of the tokens: {(batch, tokens)}."
            )
        at = None if self.prompt_end is None else self.prompt_end - 1 - offset
        if at is None or at < 0:
            return turns
        turns = (
            torch.zeros(batch, tokens, dtype=torch.bool, device=device)
            if turns is None
            else turns.clone()
        )
        if self.prompt_turns is not None:  # beams repeat each row of the prompt
            known = self.prompt_turns[:, offset : offset + tokens]
            turns[:, : known.shape[1]] |= known.repeat_interleave(batch // len(known), 0)
        if at < tokens:
            turns[:, at] = True
        return turns

    def count_call(self, calls: tuple[int, int]) -> tuple[int, int]:
        """Under gradient checkpointing a site may run twice per forward pass: at first, and recomputed.

        Raises:
            TrainingError: a third time: two forward passes came before one backward, and the first
                one's control is gone.
        """
        serial, n = calls
        n = n + 1 if serial == self.serial else 1
        if n > 2:
            raise TrainingError(
                "two forward passes before one backward under gradient checkpointing: the control of the "
                "first is gone. Put both in one batch, call backward after each, or switch checkpointing off."
            )
        return self.serial, n


class MarkedGenerate:
    """`model.generate` that marks the prompt's end as a turn start.

    `turn_starts` marks earlier turns; `evidence` (batch, features) is what is known of the evidence;
    `route` (batch, tokens) says which expert a routed model shall use (see `AgenticRouter`).
    """

    def __init__(self, model: Any, runtime: Runtime):
        self.model, self.runtime = model, runtime

    def __call__(
        self,
        *args: Any,
        turn_starts: Tensor | None = None,
        evidence: Tensor | None = None,
        route: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        prompt: Any = next(
            (
                p
                for p in (
                    *args[:1],
                    *(kwargs.get(k) for k in ("inputs", "input_ids", "inputs_embeds")),
                )
                if p is not None
            ),
            None,
        )
        runtime = self.runtime
        if evidence is not None:
            evidence = known = _features(evidence)
            if isinstance(prompt, Tensor) and len(known) != len(prompt):
                raise AttachError(
                    f"evidence has {len(known)} rows for {len(prompt)} prompts: one row each."
                )
        runtime.prompt_end = prompt.shape[1] if isinstance(prompt, Tensor) else None
        runtime.prompt_turns, runtime.prompt_evidence = turn_starts, evidence
        runtime.prompt_route = route
        runtime.generating = True
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            runtime.prompt_turns = runtime.prompt_evidence = runtime.prompt_route = None
            runtime.prompt_end, runtime.generating = None, False


def _features(given: Any) -> Tensor:
    """Evidence as a tensor; AttachError unless it holds numbers from 0 to 1."""
    try:
        features = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise AttachError(f"evidence must be a tensor of features: {error}.") from None
    if not bool(((features >= 0) & (features <= 1)).all()):  # False for NaN too
        raise AttachError(
            "evidence holds NaN or a number outside [0, 1]: give EvidenceRecord.features()."
        )
    return features


def _refuse_reentrant(block: Any) -> None:
    """Reentrant checkpointing runs backward once per block: through the control, which all blocks share."""
    settings = getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {})
    if settings.get("use_reentrant", False):
        raise TrainingError(
            "reentrant gradient checkpointing cannot carry a control that several blocks share: call "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
        )


def _find_cache(args: tuple, kwargs: dict) -> Cache | None:
    """The cache among a decoder block's arguments: its name differs between architectures."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = next((a for a in (*args, *kwargs.values()) if isinstance(a, Cache)), None)
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
