"""The contract of a router: what it may never do, on any architecture.

    report = check_router(lambda model: bem.mount(model, experts, chunk_size=8))
    print(report.table()); report.raise_if_failed()

Models are built here, tiny and random; the policy's last layers are perturbed before a check, so
that different texts get different plans: a router that never switches would pass everything.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from bem.adapters.checks import TOKENS, TOLERANCE, Outcome, Report
from bem.adapters.checks_models import ARCHITECTURES, VOCAB, tiny_model
from bem.routing.action import EXPERT, FADE, FLIPS, PLAN
from bem.routing.checks_plans import (
    ROWS,
    chunks_until,
    cropped,
    drawing,
    forward,
    in_pieces,
    lively,
    logits_of,
    longest_run,
    plan_in,
    plan_of,
    token_ids,
    turn_starts,
)
from bem.routing.mounted import Mounted

Make = Callable[[Any], Mounted]


def check_router(
    make: Make, architectures: list[str] | None = None, checks: list[str] | None = None
) -> Report:
    """Run the contract.

    Args:
        make: mounts experts and a router with chunks of 8 tokens on a model; called afresh for every
            check.
        architectures: names from `ARCHITECTURES`; None: all.
        checks: names from `CHECKS`; None: all.
    """
    outcomes = []
    for arch in architectures or list(ARCHITECTURES):
        for name in checks or list(CHECKS):
            try:
                outcomes.append(Outcome(arch, name, True, CHECKS[name](make, arch)))
            except Exception as error:  # a check of foreign code: whatever it raises is its result
                outcomes.append(Outcome(arch, name, False, f"{type(error).__name__}: {error}"))
    return Report(tuple(outcomes))


def same_seed_same_plan(make: Make, arch: str) -> str:
    """Most likely plans repeat; drawn plans repeat with their seed, and differ without it."""
    mounted = lively(make(tiny_model(arch)))
    first, again = plan_of(mounted, token_ids()), plan_of(mounted, token_ids())
    assert torch.equal(first, again), "the most likely plan changed"
    drawn = [plan_of(mounted, token_ids(), drawing(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]), "the same seed drew another plan"
    assert not torch.equal(drawn[0], drawn[2]), "another seed drew the same plan"
    used = first[..., EXPERT].unique().numel()
    assert used > 1, "the check is void: the perturbed router uses one expert only"
    return f"{used} options used"


def prefix_causal(make: Make, arch: str) -> str:
    """A later token changes no earlier action and no earlier logit; actions do depend on the text."""
    mounted = lively(make(tiny_model(arch)))
    ids, size = token_ids(), mounted.router.chunk_size
    before, logits = plan_of(mounted, ids), logits_of(mounted, ids)
    moved = 0
    for at in (7, 12, 20, 38):
        changed = ids.clone()
        changed[:, at:] = (changed[:, at:] + 7) % VOCAB
        plan = plan_of(mounted, changed)
        earlier = chunks_until(at, size)
        assert torch.equal(plan[:, :earlier], before[:, :earlier]), (
            f"token {at} changed an earlier chunk"
        )
        moved += int((plan != before).any())
        difference = float((logits_of(mounted, changed)[:, :at] - logits[:, :at]).abs().max())
        assert difference < 1e-5, f"token {at} moved an earlier logit by {difference:.1e}"
    assert moved, "the check is void: no text changed any action"
    return f"{moved} of 4 texts changed the plan"


def plans_are_short(make: Make, arch: str) -> str:
    """No turn holds more different actions than `plan_length`, whatever is drawn."""
    mounted = lively(make(tiny_model(arch)))
    limit, longest = mounted.router.limits.plan_length, 0
    for seed in range(4):
        plan = plan_of(mounted, token_ids(), drawing(seed))
        longest = max(longest, int(plan[..., PLAN].max()), longest_run(plan, mounted))
    assert longest <= limit, f"a turn holds {longest} actions, {limit} are allowed"
    return f"longest {longest}"


def flips_stay_in_budget(make: Make, arch: str) -> str:
    """Changes of expert never exceed burst + rate * chunks, at any chunk."""
    mounted = lively(make(tiny_model(arch)))
    limits, most = mounted.router.limits, 0
    for seed in range(4):
        plan = plan_of(mounted, token_ids(), drawing(seed))
        experts = plan[..., EXPERT]
        flips = (experts[:, 1:] != experts[:, :-1]).long().cumsum(1)
        assert torch.equal(flips.float(), plan[:, 1:, FLIPS]), "the record miscounts the flips"
        chunks = torch.arange(2, plan.shape[1] + 1)
        over = flips > limits.flip_burst + limits.flip_rate_max * chunks
        assert not over.any(), f"{int(flips.max())} flips in {plan.shape[1]} chunks"
        most = max(most, int(flips.max()))
    return f"at most {most}"


def equal_through_the_cache(make: Make, arch: str) -> str:
    """Token by token, in uneven pieces and copied: the same plan and the same logits."""
    mounted = lively(make(tiny_model(arch)))
    ids = token_ids()
    plan, full = plan_of(mounted, ids), logits_of(mounted, ids)
    worst = 0.0
    for cuts in (list(range(1, TOKENS)), [5, 13, 14, 31], [8, 16, 40]):
        logits, cache = in_pieces(mounted, ids, cuts)
        assert torch.equal(plan_in(cache), plan), f"cut at {cuts[:4]}: another plan"
        worst = max(worst, float((logits - full).abs().max()))
    _, cache = in_pieces(mounted, ids[:, :21], [13])
    for each in (copy.deepcopy(cache), cache):
        rest = forward(
            mounted, ids[:, 21:], turn_starts=turn_starts(ids)[:, 21:], past_key_values=each
        )
        worst = max(worst, float((rest.logits - full[:, 21:]).abs().max()))
        assert torch.equal(plan_in(each), plan), "a copied cache gives another plan"
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def equal_after_cropping(make: Make, arch: str) -> str:
    """Cropped inside a chunk, at its end and before a turn start, and continued: the plan and the logits
    of the whole, whatever stood behind the cut."""
    mounted = lively(make(tiny_model(arch)))
    ids, turns = token_ids(), turn_starts(token_ids())
    plan, full = plan_of(mounted, ids), logits_of(mounted, ids)
    worst, cuts = 0.0, 0
    for length, keep in ((30, 21), (27, 19), (30, 9), (TOKENS, 43)):
        other = ids.clone()
        other[:, keep:] = (other[:, keep:] + 7) % VOCAB  # what is forgotten was another text
        _, cache = in_pieces(mounted, other[:, :length], [13])
        if not cropped(cache, length, keep):
            return "this cache cannot be cropped"
        rest = forward(mounted, ids[:, keep:], turn_starts=turns[:, keep:], past_key_values=cache)
        worst, cuts = max(worst, float((rest.logits - full[:, keep:]).abs().max())), cuts + 1
        assert torch.equal(plan_in(cache), plan), f"cropped to {keep}: another plan"
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{cuts} cuts, {worst:.0e}"


def equal_in_a_batch(make: Make, arch: str) -> str:
    """Left-padded among others, each conversation gets the plan and the logits it gets alone."""
    mounted = lively(make(tiny_model(arch)))
    ids, worst = token_ids(), 0.0
    lengths = [TOKENS - 3 * row for row in range(ROWS)]
    mask = torch.stack([torch.arange(TOKENS) >= TOKENS - n for n in lengths]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    turns = turn_starts(ids) & mask.bool()
    given = {"attention_mask": mask, "position_ids": positions, "turn_starts": turns}
    whole = forward(mounted, ids, use_cache=True, **given)
    plan = plan_in(whole.past_key_values)
    for row, length in enumerate(lengths):
        alone = forward(
            mounted,
            ids[row : row + 1, -length:],
            turn_starts=turns[row : row + 1, -length:],
            use_cache=True,
        )
        own = plan_in(alone.past_key_values)[0]
        assert torch.equal(plan[row, : len(own)], own), f"row {row}: another plan in the batch"
        worst = max(worst, float((whole.logits[row, -length:] - alone.logits[0]).abs().max()))
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def equal_under_beams(make: Make, arch: str) -> str:
    """Beam search scores what a forward without cache scores."""
    mounted = lively(make(tiny_model(arch)))
    mounted.base.generation_config.eos_token_id = None
    prompt = token_ids()[:2, :13]
    with torch.no_grad():
        out = mounted.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=20,
            num_beams=3,
            do_sample=False,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
    turns = torch.zeros_like(out.sequences, dtype=torch.bool)
    turns[:, prompt.shape[1] - 1] = True
    plain = forward(mounted, out.sequences, turn_starts=turns, use_cache=False).logits
    new = out.sequences[:, prompt.shape[1] :, None]
    expected = plain[:, prompt.shape[1] - 1 : -1].log_softmax(-1).gather(-1, new)[..., 0]
    scores = mounted.model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    worst = float((scores - expected).abs().max())
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def survives_unloading(make: Make, arch: str) -> str:
    """An expert taken away in the middle of conversations: those that run go on to the bit as if nothing
    had happened; new ones never meet it, and go as before where they never met it."""
    mounted = lively(make(tiny_model(arch)))
    ids, turns = token_ids(), turn_starts(token_ids())
    before, logits = plan_of(mounted, ids), logits_of(mounted, ids)
    cut, gone, untouched = _least_disturbing(before[..., EXPERT], mounted.router.chunk_size)
    _, cache = in_pieces(mounted, ids[:, :cut], [cut // 2])
    rest = {"turn_starts": turns[:, cut:], "past_key_values": copy.deepcopy(cache)}
    expected = forward(mounted, ids[:, cut:], **rest).logits
    mounted.unload(mounted.router.space.name(gone))
    rest["past_key_values"] = cache
    actual = forward(mounted, ids[:, cut:], **rest).logits
    assert torch.equal(actual, expected), "a running conversation noticed"
    assert torch.equal(plan_in(cache), before), "a running conversation got another plan"
    fresh, after = plan_of(mounted, ids), logits_of(mounted, ids)
    assert not (fresh[..., EXPERT] == gone).any(), "an unloaded expert was chosen"
    same = [c for c in range(fresh.shape[-1]) if c != FADE]  # how sure the policy is may change
    assert torch.equal(fresh[untouched][..., same], before[untouched][..., same]), "others noticed"
    if torch.equal(fresh[untouched], before[untouched]):
        worst = float((after[untouched] - logits[untouched]).abs().max())
        assert worst < TOLERANCE, f"others noticed: max |difference| {worst:.1e}"
    return f"{int((~untouched).sum())} of {ROWS} had met it, {int(untouched.sum())} never did"


def _least_disturbing(experts: torch.Tensor, size: int) -> tuple[int, int, torch.Tensor]:
    """(a column inside a chunk, the expert in force there in some conversation that most conversations
    never meet, bool (rows,): which ones)."""
    cases = []
    for cut in range(14, TOKENS - 1):
        begun = chunks_until(cut - 1, size)
        if begun == chunks_until(cut, size):  # the chunk that runs there goes on
            for option in experts[:, begun - 1].long().unique().tolist():
                never = ~(experts == option).any(1)
                cases += [(int(never.sum()), -cut, option, never)] if option else []
    assert cases, "the check is void: the perturbed router uses the bare base alone"
    count, cut, option, never = max(cases, key=lambda c: c[:3])
    assert count, "the check is void: every conversation meets every expert"
    return -cut, option, never


CHECKS: dict[str, Callable[[Make, str], str]] = {
    f.__name__: f
    for f in (
        same_seed_same_plan,
        prefix_causal,
        plans_are_short,
        flips_stay_in_budget,
        equal_through_the_cache,
        equal_after_cropping,
        equal_in_a_batch,
        equal_under_beams,
        survives_unloading,
    )
}
