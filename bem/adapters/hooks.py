"""Hooks that carry control through a model: its call, its decoder, the router layer, each block.

What passes from hook to hook is the `StepContext` of the thread that runs the pass (see
`control.context`). At each block one hook runs, in this order: the block's own updates (at its
sites), FiLM, and whatever must be last. Switching the adapter off takes away the first two only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bem.adapters.sites import clean_name
from bem.adapters.streams import Streams, streams_of
from bem.control.chunks import turns_from_labels
from bem.control.context import Ambient, StepContext
from bem.control.generation import taken_from
from bem.control.step import enter, find_cache
from bem.control.wiring import Wiring
from bem.errors import AttachError, CacheError, TrainingError

LastStage = Callable[[int, Tensor], Tensor]
"""(block, hidden states) -> hidden states. What it depends on, it names in an attribute `identity` (JSON):
outputs of the model depend on it too."""


class Runtime:
    """What hangs on one model: which adapter acts, and the hooks that make it act."""

    def __init__(self) -> None:
        self.ambient = Ambient()
        self.wiring: Wiring | None = None  # the active adapter, if it has a controller
        self.wirings: list[Wiring] = []
        self.plans: dict[str, Any] = {}  # adapter name -> where its modules go (see peft_method)
        self.last: dict[int, list[LastStage]] = {}  # decoder block -> what runs behind all else
        self.handles: list[Any] = []
        self._spread: dict[int, tuple[Tensor, Tensor]] = {}
        self._of_call: list[str] = []  # arguments of the model
        self._arguments: list[str] = []  # arguments of the decoder
        self._streams = Streams()

    def install(
        self,
        model: nn.Module,
        wirings: list[Wiring],
        blocks: Sequence[str],
        attn_out: dict[int, nn.Module],
    ) -> None:
        """(Re)place the hooks that the given adapters need; blocks: names, bottom to top."""
        self.remove()
        self.wirings = wirings
        modules = {clean_name(n): m for n, m in model.named_modules()}
        decoder = decoder_of(modules, blocks)
        self._of_call = list(inspect.signature(model.forward).parameters)
        self._arguments = list(inspect.signature(decoder.forward).parameters)
        self._streams = streams_of(model)
        if wirings:
            stack = [modules[name] for name in blocks]
            begins = partial(self._pass_begins, stack)
            self.handles += [
                decoder.register_forward_pre_hook(begins, with_kwargs=True),
                decoder.register_forward_hook(self._pass_ends, always_call=True),
            ]
        self._install_layers(wirings, [modules[name] for name in blocks], attn_out, modules)

    def _install_layers(
        self,
        wirings: list[Wiring],
        blocks: list[nn.Module],
        attn_out: dict[int, nn.Module],
        modules: dict[str, nn.Module],
    ) -> None:
        for layer in sorted({w.layer for w in wirings}):
            hook = partial(self._enter, layer)
            self.handles.append(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True))
            reads_heads = any(w.layer == layer and w.controller.n_heads for w in wirings)
            if reads_heads and layer - 1 in attn_out:
                self.handles.append(attn_out[layer - 1].register_forward_pre_hook(self._listen))
        for block in sorted({b for w in wirings for b in w.films} | set(self.last)):
            self.handles.append(blocks[block].register_forward_hook(partial(self._behind, block)))
        for block, queries in sorted({b: q for w in wirings for b, q in w.queries.items()}.items()):
            hook = partial(self._shape, block)
            self.handles.append(modules[queries.name].register_forward_hook(hook))

    def identity_of_last(self) -> list[list[Any]]:
        """[block, identity] of each last stage, bottom to top."""
        stages = [(block, stage) for block in sorted(self.last) for stage in self.last[block]]
        return [[b, getattr(s, "identity", type(s).__qualname__)] for b, s in stages]

    def remove(self) -> None:
        """Take all hooks off the model."""
        self._spread = {}
        for handle in self.handles:
            handle.remove()
        self.handles = []

    # --- a call, and the decoder's pass inside it -------------------------------------------------

    def call_begins(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Take out of a call's arguments what is ours; the decoder's hook finds it."""
        given = taken_from(kwargs)
        if self.wiring is not None:
            named = dict(zip(self._of_call, args, strict=False)) | kwargs
            if given.turns is None and named.get("labels") is not None:
                given.turns = turns_from_labels(named["labels"])
            prepared = self.ambient.generating is not None or _is_ragged(find_cache(args, kwargs))
            given.mask = _mask(named.get("attention_mask"), prepared)
            self.ambient.given = given

    def call_ends(self) -> None:
        """Whatever was given held for one call."""
        self.ambient.given = None

    def _pass_begins(
        self, blocks: list[nn.Module], decoder: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        ambient, ours = self.ambient, taken_from(kwargs)  # called directly, it gets them itself
        given, ambient.given = ambient.given, None
        ambient.last = None  # or its tables would lie beside what this pass needs
        if self.wiring is None:
            _refuse_foreign_cache(args, kwargs)
            return args, kwargs
        named = dict(zip(self._arguments, args, strict=False)) | kwargs
        call, mask = ambient.generating, named.get("attention_mask")
        if given is None:
            given = ours
            given.mask = _mask(mask, call is not None or _is_ragged(find_cache(args, kwargs)))
        positions = named.get("position_ids")
        ambient.context = StepContext(
            mask=mask if _is_plain(mask) else given.mask,
            given=given,
            generating=call if call is not None and call.runs(find_cache(args, kwargs)) else None,
            documents=positions if isinstance(positions, Tensor) and positions.dim() == 2 else None,
        )
        if torch.is_grad_enabled():
            for block in blocks:
                _carry(block, ambient)
        if "logits_to_keep" in self._arguments:  # Gemma 4 would drop tokens on the way up
            kwargs = {**kwargs, "logits_to_keep": 0}
        return args, kwargs

    def _pass_ends(self, *_: Any) -> None:
        self.ambient.last, self.ambient.context = self.ambient.context, None

    # --- inside -----------------------------------------------------------------------------------

    def _listen(self, attn_out: nn.Module, args: tuple) -> None:
        if self.wiring is not None:
            self.ambient.current().head_input = args[0]

    def _enter(self, layer: int, block: Any, args: tuple, kwargs: dict) -> None:
        """Before the router layer runs: turn what was read so far into control for every site above."""
        wiring = self.wiring
        if wiring is None or wiring.layer != layer:
            return
        context = self.ambient.current()
        context.checkpointing = (
            bool(getattr(block, "gradient_checkpointing", False)) and block.training
        )
        hidden = self._streams.one(args[0] if args else kwargs["hidden_states"])
        enter(context, wiring, hidden, None if context.checkpointing else find_cache(args, kwargs))
        if context.slot is not None:  # chunks begin: what was spread is of those that are over
            self._spread = {}

    def _behind(self, block: int, module: nn.Module, args: tuple, output: Any) -> Any:
        """Behind a block: FiLM, then whatever must be last."""
        several = isinstance(output, tuple | list)
        hidden = output[0] if several else output
        wiring = self.wiring
        if wiring is not None and block in wiring.films:
            index = wiring.films[block]
            context = self.ambient.current()
            film = context.updates[index] if context.updates else None
            film = film or wiring.members[index].modulate
            hidden = self._streams.each(hidden, film, *context.control(index))
        for stage in self.last.get(block, ()):
            hidden = stage(block, hidden)
        return type(output)((hidden, *output[1:])) if several else hidden

    def _shape(self, block: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        wiring = self.wiring
        if wiring is None or block not in wiring.shapings:
            return output
        queries = wiring.queries[block]
        table, slot = self.ambient.current().control(wiring.shapings[block])
        source, factors = self._spread.get(block, (None, None))
        if source is not table or factors is None:  # while a chunk is decoded, both stay
            factors = queries.of_table(table)
            if slot is None:
                self._spread[block] = (table, factors)
        factors = factors if slot is None else factors.index_select(0, slot)
        return output * queries.per_token(factors, output)


def add_last_stage(model: nn.Module, block: int, stage: LastStage, rewire: Callable) -> None:
    """Run `stage` behind a decoder block, after the adapter's own changes, whether or not it is on."""
    runtime: Any = model.bem_runtime
    runtime.last.setdefault(block, []).append(stage)
    rewire(model)


def decoder_of(modules: dict[str, nn.Module], blocks: Sequence[str]) -> nn.Module:
    """The module whose forward pass runs the blocks: the nearest one above them that has one."""
    name = blocks[0].rpartition(".")[0]
    while name:
        name = name.rpartition(".")[0]
        if type(modules[name]).forward is not nn.Module.forward and not isinstance(
            modules[name], nn.ModuleDict | nn.ModuleList
        ):
            return modules[name]
    raise AttachError(f"no module above {blocks[0]} has a forward pass of its own.")


def _mask(mask: Any, prepared: bool) -> Tensor | None:
    """The 2-D mask that a caller gave; AttachError if it has another form.

    prepared: another form is right: a static cache has its masks made before the model is called, a
        ragged one knows its padding.
    """
    if mask is None or _is_plain(mask):
        return mask
    if prepared:
        return None
    form = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise AttachError(
        f"BEM needs the 2-D attention mask (batch, tokens), got {form}: it tells padding from text."
    )


def _is_ragged(cache: Any) -> bool:
    return bool(cache is not None and cache.layers and getattr(cache.layers[-1], "ragged", False))


def _is_plain(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _refuse_foreign_cache(args: tuple, kwargs: dict[str, Any]) -> None:
    """A cache that was filled under an adapter is of no use without it."""
    cache = find_cache(args, kwargs)
    if cache is not None and cache.layers and getattr(cache.layers[-1], "columns", 0):
        raise CacheError(
            "this cache was filled under an adapter that is switched off now: its keys and values belong to "
            "the adapter. Start with a new cache."
        )


class _Carried:
    """A block's gradient checkpointing that takes the pass along: backward runs the block again."""

    def __init__(self, function: Callable, ambient: Ambient):
        self.function, self.ambient = function, ambient

    def __call__(self, block: Callable, *args: Any, **kwargs: Any) -> Any:
        context = self.ambient.context
        if context is None:
            return self.function(block, *args, **kwargs)
        _refuse_reentrant(self.function)

        def again(*inner: Any, **named: Any) -> Any:
            with self.ambient.entered(context):
                return block(*inner, **named)

        return self.function(again, *args, **kwargs)


def _carry(block: Any, ambient: Ambient) -> None:
    function = getattr(block, "_gradient_checkpointing_func", None)
    if function is not None and block.training and not isinstance(function, _Carried):
        block._gradient_checkpointing_func = _Carried(function, ambient)


def _refuse_reentrant(function: Any) -> None:
    """Reentrant checkpointing runs backward once per block: through the control, which all blocks share."""
    if getattr(function, "keywords", {}).get("use_reentrant", False):
        raise TrainingError(
            "reentrant gradient checkpointing cannot carry a control that several blocks share: call "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
        )
