"""At the router layer of one forward pass: from hidden states to the control of every site above it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from bem.control.cache import ControlLayer, control_layer
from bem.control.chunks import Documents, slots_needed
from bem.control.context import StepContext
from bem.control.controller import Pooled
from bem.control.wiring import Wiring
from bem.errors import AttachError, CacheError


def enter(context: StepContext, wiring: Wiring, hidden: Tensor, cache: Cache | None) -> None:
    """Fill the context's control tables.

    Args:
        hidden: what enters the router layer (batch, tokens, d_model).
        cache: the K/V cache of the pass, if there is one.
    """
    if hidden.dim() != 3:
        raise AttachError(
            f"a block gets hidden states {tuple(hidden.shape)}, not (batch, tokens, width): a model that carries "
            "several streams cannot be routed. Use s0 or v3."
        )
    if context.tables is not None and not context.checkpointing:
        raise AttachError(
            f"block {wiring.layer} runs several times in one pass: a model that repeats its blocks cannot be "
            "routed. Use s0 or v3."
        )
    context.shape = (hidden.shape[0], hidden.shape[1])
    if cache is None:
        context.acting = wiring.acting()
        _route_piece(context, wiring, hidden, None)
    elif torch.compiler.is_compiling():
        _uncompiled(_route_cached)(context, wiring, hidden, cache)
    else:  # straight: the wrapper costs as much as all else that is done for a token
        _route_cached(context, wiring, hidden, cache)


_uncompiled: Any = torch.compiler.disable


def _route_cached(context: StepContext, wiring: Wiring, hidden: Tensor, cache: Cache) -> None:
    layer = control_layer(cache, wiring)
    context.acting = layer.acting
    if layer.refusal:
        raise CacheError(layer.refusal)
    held = cached_length(cache, wiring.layer)
    if held is not None and held != layer.columns:
        raise CacheError(
            f"the cache holds {held} tokens of which adapter {wiring.name!r} has seen {layer.columns}. "
            "It was filled without the adapter or cropped outside BEM: start with a new cache."
        )
    if _stays_in_chunk(context, hidden, layer):
        context.tables, context.updates = layer.running(hidden.dtype)
        context.slot = None
        layer.append_token(_features(context, hidden))
    else:
        _route_piece(context, wiring, hidden, layer)


def cached_length(cache: Cache, layer: int) -> int | None:
    """Tokens that the cache holds for a layer; None where only the device knows, or nobody does."""
    try:
        held = cache.get_seq_length(layer)
    except ValueError:  # a linear attention layer keeps no tokens
        return None
    return held if isinstance(held, int) else None


def find_cache(args: tuple, kwargs: dict[str, Any]) -> Cache | None:
    """The cache among a decoder block's arguments: its name differs between architectures."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = next((a for a in (*args, *kwargs.values()) if isinstance(a, Cache)), None)
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _stays_in_chunk(context: StepContext, hidden: Tensor, layer: ControlLayer) -> bool:
    """Is this one decoded token, inside the running chunk of every row? Then nothing is decided."""
    call = context.generating
    if hidden.shape[1] != 1 or layer.state is None or context.given.turns is not None:
        return False
    if context.given.conditioning or context.given.route is not None:
        return False  # it may hold from this token on
    if call is None:
        return context.mask is None and layer.stays()  # a mask may declare padding
    return layer.columns >= call.prompt and layer.stays()


def _route_piece(
    context: StepContext, wiring: Wiring, hidden: Tensor, layer: ControlLayer | None
) -> None:
    batch, tokens = hidden.shape[:2]
    offset = 0 if layer is None else layer.columns
    valid = None if layer is None else layer.real(tokens)
    if valid is None:
        valid = _valid(context, batch, tokens, offset, hidden.device)
    turns = _turn_starts(context, batch, tokens, offset, valid)
    route = _route(context, batch, tokens, offset, hidden.device)
    context.packed = _documents(context, valid, layer)
    with torch.autocast(hidden.device.type, enabled=False):
        features = _features(context, hidden)
        if (packed := context.packed) is None:
            pooled = _decide(context, wiring, features, valid, turns, route, layer, hidden)
            slot = pooled.slot
        else:
            alone = [None if x is None else packed.fold(x) for x in (features, valid, turns, route)]
            alone[1] = alone[1] & packed.real  # type: ignore[operator]
            pooled = _decide(context, wiring, *alone, None, hidden)  # type: ignore[arg-type]
            slot = packed.unfold(_rows(pooled))
    dtype = hidden.dtype
    table = pooled.control.flatten(0, 1).to(dtype)
    context.tables = table.split(wiring.widths, -1)
    context.slot = (slot if context.packed is not None else _rows(pooled)).flatten()
    if layer is not None and generating_prompt(context, layer):
        layer.count()


def _features(context: StepContext, hidden: Tensor) -> Tensor:
    """What the controller pools of each token. The heads' outputs are let go: the pass outlives its use of them."""
    features = context.acting.controller.features(hidden, context.head_input)
    if not context.checkpointing:  # then backward enters once more
        context.head_input = None
    return features


def generating_prompt(context: StepContext, layer: ControlLayer) -> bool:
    """Was the prompt of a `generate` just finished? Decoding follows: count once, then never ask again."""
    call = context.generating
    return call is not None and layer.columns >= call.prompt


def _rows(pooled: Pooled) -> Tensor:
    """Row of the flattened control table of each token (rows, tokens)."""
    rows = torch.arange(len(pooled.slot), device=pooled.slot.device)[:, None]
    return pooled.slot + rows * pooled.control.shape[1]


def _decide(
    context: StepContext,
    wiring: Wiring,
    features: Tensor,
    valid: Tensor,
    turns: Tensor | None,
    route: Tensor | None,
    layer: ControlLayer | None,
    hidden: Tensor,
) -> Pooled:
    """Pool the piece and decide its chunks; the cache's layer, if there is one, takes both over."""
    acting, (rows, tokens) = context.acting, features.shape[:2]
    controller = acting.controller
    if layer is None:
        before = controller.start(rows, sum(wiring.widths), hidden.device)
    else:
        before = layer.before(rows, hidden.device)
    begun = slots_needed(tokens, turns, controller.chunk_size)
    pooled = controller.pool(features, valid, turns, before, begun)
    known = _conditioning(context, wiring, pooled, layer, hidden.shape[1])
    control = controller.decide(acting.members, pooled, turns, known, route, _compute_dtype(hidden))
    # rounded once, to what is applied; the tail is the controller's own and stays float32
    applied, tail = control.split(
        [wiring.layout.applied, control.shape[-1] - wiring.layout.applied], -1
    )
    control = torch.cat([applied.to(hidden.dtype).float(), tail.float()], -1)
    pooled = pooled.with_control(control)
    if layer is not None:
        layer.append(pooled, features, valid, begun)
    return pooled


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


# --- what the caller said ---------------------------------------------------------------------------


def _valid(
    context: StepContext, batch: int, tokens: int, offset: int, device: torch.device
) -> Tensor:
    call, mask = context.generating, context.mask
    if mask is not None:
        return mask[:, -tokens:].to(device).bool()
    valid = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if call is not None and call.mask is not None and offset < call.prompt:
        known = _repeated(call.mask, batch)[:, offset : offset + tokens].to(device).bool()
        valid[:, : known.shape[1]] = known
    return valid


def _turn_starts(
    context: StepContext, batch: int, tokens: int, offset: int, valid: Tensor
) -> Tensor | None:
    """Turn starts of this piece, from the caller, the labels or the end of the prompt."""
    turns, call = context.given.turns, context.generating
    if turns is not None and turns.shape != (batch, tokens):
        raise AttachError(
            f"turn_starts {tuple(turns.shape)} must have the shape of the tokens: {(batch, tokens)}."
        )
    if turns is not None:
        turns = turns.to(valid.device).bool()
    if call is None or offset >= call.prompt:
        return turns
    if call.turns is None:  # the first piece of a prompt: where does each row end?
        whole = valid if tokens >= call.prompt else valid.new_ones(batch, call.prompt)
        call.turns = last_tokens(whole, call.prompt)
    known = _repeated(call.turns, batch)[:, offset : offset + tokens].to(valid.device)
    if call.given.turns is not None:
        marked = _repeated(call.given.turns, batch)[:, offset : offset + tokens]
        known = known | marked.to(valid.device).bool()
    made = torch.zeros_like(valid) if turns is None else turns.clone()
    made[:, : known.shape[1]] |= known
    return made


def last_tokens(valid: Tensor, prompt: int) -> Tensor:
    """True at the last real token of each row of a prompt (rows, prompt)."""
    columns = torch.arange(prompt, device=valid.device)
    last = torch.where(valid[:, :prompt].bool(), columns, -1).max(1).values
    return columns == last[:, None]


def _route(
    context: StepContext, batch: int, tokens: int, offset: int, device: torch.device
) -> Tensor | None:
    """The caller's route for this piece, int (batch, tokens, ...); -1 behind the prompt: hold."""
    call = context.generating
    told = (context.given.route, call and call.given.route)
    if any(r is not None for r in told) and not context.acting.controller.routes:
        raise AttachError("route names experts, and none are mounted here: see bem.mount.")
    if (route := context.given.route) is not None:
        if route.shape[:2] != (batch, tokens):
            raise AttachError(
                f"route {tuple(route.shape)} must begin with the shape of the tokens: {(batch, tokens)}."
            )
        return route.to(device)
    if call is None or call.given.route is None:
        return None
    known = _repeated(call.given.route, batch)[:, offset : offset + tokens].to(device)
    behind = known.new_full((batch, tokens - known.shape[1], *known.shape[2:]), -1)
    return torch.cat([known, behind], 1)


def _conditioning(
    context: StepContext,
    wiring: Wiring,
    pooled: Pooled,
    layer: ControlLayer | None,
    tokens: int,
) -> dict[str, Tensor]:
    """What is known at each chunk that begins in the piece: name -> (rows, new, width).

    What is given holds from now on; it is kept once per sequence.
    """
    controller, call = context.acting.controller, context.generating
    rows, new = len(pooled.slot), pooled.sums.shape[1] - 1
    known: dict[str, Tensor] = {}
    for name, width in controller.conditioning.items():
        value = context.given.conditioning.get(name)
        if value is None and call is not None and name in call.given.conditioning:
            whole = rows if context.packed is None else 1
            value = _repeated(call.given.conditioning[name], whole)
        held = None if layer is None else layer.known(name)
        if value is None:
            value = pooled.sums.new_zeros(rows, width).float() if held is None else held
        else:
            value = _of_rows(value.to(pooled.slot.device), name, width, context, rows, tokens)
        if value.dim() == 3:  # by token: a chunk takes its first one's
            at = pooled.first_tokens[..., None].expand(-1, -1, width)
            last, value = value[:, -1], value.gather(1, at)
        else:
            last, value = value, value[:, None].expand(-1, new, -1)
        if layer is not None and held is not None:
            layer.tell(name, last)
        known[name] = torch.zeros_like(value) if controller.blind else value
    return known


def _of_rows(
    value: Tensor, name: str, width: int, context: StepContext, rows: int, tokens: int
) -> Tensor:
    packed = context.packed
    batch = rows if packed is None else len(packed.place)
    if value.shape not in ((batch, width), (batch, tokens, width)):
        raise AttachError(
            f"conditioning {name!r} {tuple(value.shape)} must be (batch, {width}) {(batch, width)} or (batch, "
            f"tokens, {width}) {(batch, tokens, width)}."
        )
    if packed is None:
        return value
    return packed.fold(value) if value.dim() == 3 else packed.fold_rows(value, tokens)


def _documents(context: StepContext, valid: Tensor, layer: ControlLayer | None) -> Documents | None:
    """Documents packed into rows, told apart by positions that start again.

    A cache that such a pass fills is of no further use: its rows are several sequences.

    Raises:
        CacheError: the cache holds something already.
    """
    if context.documents is None or context.generating is not None or valid.shape[1] == 1:
        return None
    if layer is not None and layer.ragged:
        return None  # a row is one sequence
    packed = Documents.of(context.documents, valid)
    if packed is not None and layer is not None:
        layer.refusal = (
            f"{len(packed.columns)} documents are packed into {len(valid)} rows (their positions start again): a "
            "cache cannot go on from there. Give each document a row of its own."
        )
        if layer.columns:
            raise CacheError(layer.refusal)
    return packed


def _repeated(rows: Tensor, batch: int) -> Tensor:
    """The rows of a prompt, each as often as `generate` repeats it (beams, several answers)."""
    if batch % len(rows):
        raise AttachError(f"{len(rows)} prompts do not go into a batch of {batch} rows.")
    return rows.repeat_interleave(batch // len(rows), 0)
