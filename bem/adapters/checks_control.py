"""The contract: control never sees the future, and a sequence is the same however it is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from bem.adapters.attached import Attached
from bem.adapters.checks_models import VOCAB, tiny_model
from bem.adapters.checks_probe import (
    TOKENS,
    TOLERANCE,
    arguments,
    assert_equal,
    cache_name,
    crop,
    difference,
    evidence_for,
    forward,
    in_pieces,
    logits,
    perturbed,
    piece,
    token_ids,
)
from bem.control.chunks import turns_from_labels

Make = Callable[[Any], Attached]


def blind_to_the_future(make: Make, arch: str) -> str:
    """A later token moves no earlier logit; control is constant within a chunk."""
    attached = perturbed(make(tiny_model(arch)))
    ids = token_ids()
    before = logits(attached.model, ids)
    runtime = attached.base.bem_runtime
    if runtime.wiring is not None:
        size = runtime.wiring.controller.chunk_size
        for index in range(len(runtime.wiring.members)):
            part = runtime.ambient.last.control_per_token(index)
            for start in range(0, TOKENS, size):
                chunk = part[:, start : start + size]
                assert torch.equal(chunk, chunk[:, :1].expand_as(chunk)), (
                    "control changed inside a chunk"
                )
    for at in (7, 8, 20, TOKENS - 1):
        changed = ids.clone()
        changed[:, at] = (changed[:, at] + 1) % VOCAB
        assert_equal(logits(attached.model, changed)[:, :at], before[:, :at], 1e-5)
    return ""


def cache_is_exact(make: Make, arch: str) -> str:
    """Prefill = token by token = uneven pieces = copied prefix = cropped and continued."""
    attached = perturbed(make(tiny_model(arch)))
    ids = token_ids()
    full = logits(attached.model, ids)
    worst = 0.0
    for cuts in ([*range(1, TOKENS)], [13, 14, 15, 31, 32], [8, 16, 40]):
        worst = max(worst, difference(in_pieces(attached.model, ids, cuts), full))
    start, cache = piece(attached.model, ids[:, :19], None)
    other = copy.deepcopy(cache)
    if cache.is_croppable and hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()  # a short convolution keeps its newest inputs alone
    rest, cache = piece(attached.model, ids[:, 19:], cache)
    again, _ = piece(attached.model, ids[:, 19:], other)
    worst = max(worst, difference(torch.cat([start, rest], 1), full), difference(again, rest))
    if cache.is_croppable:
        crop(cache, TOKENS, 21)
        rest, _ = piece(attached.model, ids[:, 21:], cache)
        worst = max(worst, difference(rest, full[:, 21:]))
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def padding_is_invisible(make: Make, arch: str) -> str:
    """A left-padded batch gives each row what it gets alone, whole and in pieces."""
    attached = perturbed(make(tiny_model(arch)))
    ids, worst = token_ids(), 0.0
    lengths = (TOKENS, TOKENS - 11)
    mask = torch.stack([torch.arange(TOKENS) >= TOKENS - n for n in lengths]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    takes_positions = "position_ids" in arguments(attached.model)

    def masked(a: int, b: int, **more: Any) -> Any:
        places = {"position_ids": positions[:, a:b]} if takes_positions else {}
        return forward(attached.model, ids[:, a:b], attention_mask=mask[:, :b], **places, **more)

    whole = masked(0, TOKENS).logits
    parts, cache, name = [], None, cache_name(attached.model)
    for a, b in ((0, 5), (5, 20), (20, 21), (21, TOKENS)):
        out = masked(a, b, **{name: cache}, use_cache=True)
        cache = out[name]
        parts.append(out.logits)
    for row, length in enumerate(lengths):
        given = {k: v[row : row + 1] for k, v in evidence_for(attached.model, 2).items()}
        alone = forward(attached.model, ids[row : row + 1, -length:], **given).logits[0]
        for batch in (whole, torch.cat(parts, 1)):
            worst = max(worst, difference(batch[row, -length:], alone))
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def generation_is_exact(make: Make, arch: str) -> str:
    """Greedy and beam search through the cache score what a forward without cache scores."""
    attached = perturbed(make(tiny_model(arch)))
    prompt, worst = token_ids()[:, :13], 0.0
    for beams in (1, 3):
        out = _generated(attached, prompt, num_beams=beams, output_scores=True)
        turns = torch.zeros_like(out.sequences, dtype=torch.bool)
        turns[:, prompt.shape[1] - 1] = True
        plain = forward(attached.model, out.sequences, turn_starts=turns, use_cache=False).logits
        new = out.sequences[:, prompt.shape[1] :]
        plain = plain[:, prompt.shape[1] - 1 : -1].log_softmax(-1)
        scored = attached.model.compute_transition_scores(
            out.sequences,
            out.scores,
            getattr(out, "beam_indices", None),
            normalize_logits=beams == 1,
        )
        worst = max(worst, difference(scored, plain.gather(-1, new[..., None])[..., 0]))
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def threads_are_exact(make: Make, arch: str) -> str:
    """Two threads that generate at once on one model get exactly what each gets alone."""
    attached = perturbed(make(tiny_model(arch)))
    prompts = [token_ids()[:, :11], token_ids()[:, 11:30]]

    def generate(prompt: Tensor) -> tuple[Tensor, ...]:
        return _generated(attached, prompt, output_logits=True).logits

    alone = [generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(generate, prompts))
    for one, other in zip(alone, together, strict=True):
        assert_equal(torch.stack(other), torch.stack(one), 0.0)
    return "0"


@torch.no_grad()
def _generated(attached: Attached, prompt: Tensor, **settings: Any) -> Any:
    """20 tokens behind a prompt: nothing stops early, nothing is ruled out."""
    attached.base.generation_config.eos_token_id = None
    return attached.model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        **evidence_for(attached.model, len(prompt)),
        **settings,
    )


def turns_restart_chunks(make: Make, arch: str) -> str:
    """Training with labels and decoding behind the same prompt give the same logits."""
    attached = perturbed(make(tiny_model(arch)))
    ids = token_ids()
    labels = ids.clone()
    labels[:, :13] = -100
    trained = forward(attached.model, ids, labels=labels, use_cache=False).logits
    given = forward(
        attached.model, ids, turn_starts=turns_from_labels(labels), use_cache=False
    ).logits
    return assert_equal(given, trained, 0.0)


def evidence_travels(make: Make, arch: str) -> str:
    """Evidence given once holds on through the cache; new evidence changes no earlier logit."""
    attached, ids = perturbed(make(tiny_model(arch))), token_ids()
    given = evidence_for(attached.model, 2)
    if not given:
        return "reads no evidence"
    model, first = attached.model, given["evidence"]
    whole = forward(model, ids, use_cache=False).logits
    _, cache = piece(model, ids[:, :19], None)
    _, cache = piece(model, ids[:, 19:20], cache)
    rest = forward(model, ids[:, 20:], past_key_values=cache, evidence=None).logits
    worst = difference(rest, whole[:, 20:])
    new = first.flip(1)
    turns = torch.zeros_like(ids, dtype=torch.bool)
    turns[:, 27] = True
    by_token = torch.where(
        (torch.arange(TOKENS) >= 27)[None, :, None], new[:, None], first[:, None]
    )
    both = forward(model, ids, turn_starts=turns, evidence=by_token, use_cache=False).logits
    _, cache = piece(model, ids[:, :27], None)
    later = forward(
        model, ids[:, 27:], past_key_values=cache, turn_starts=turns[:, 27:], evidence=new
    ).logits
    worst = max(worst, difference(both[:, 27:], later), difference(both[:, :27], whole[:, :27]))
    assert difference(both[:, 27:], whole[:, 27:]) > 1e-2, "the evidence changes nothing"
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"
