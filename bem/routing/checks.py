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
from torch import Tensor

from bem.adapters.checks import TOKENS, TOLERANCE, Outcome, Report
from bem.adapters.checks_models import ARCHITECTURES, VOCAB, tiny_model
from bem.routing.action import EXPERT, FLIPS, PLAN, RANK, RECORD, STRENGTH
from bem.routing.mounted import Mounted
from bem.routing.router import Chooser

Make = Callable[[Any], Mounted]
ROWS = 6
TURNS = (4, 11)  # columns at which turns start; the last one has five chunks


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
    mounted = _lively(make(tiny_model(arch)))
    first, again = _plan(mounted, _ids()), _plan(mounted, _ids())
    assert torch.equal(first, again), "the most likely plan changed"
    drawn = [_plan(mounted, _ids(), _drawing(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]), "the same seed drew another plan"
    assert not torch.equal(drawn[0], drawn[2]), "another seed drew the same plan"
    used = first[..., EXPERT].unique().numel()
    assert used > 1, "the check is void: the perturbed router uses one expert only"
    return f"{used} options used"


def prefix_causal(make: Make, arch: str) -> str:
    """A later token changes no earlier action and no earlier logit; actions do depend on the text."""
    mounted = _lively(make(tiny_model(arch)))
    ids, size = _ids(), mounted.router.chunk_size
    before, logits = _plan(mounted, ids), _logits(mounted, ids)
    moved = 0
    for at in (7, 12, 20, 38):
        changed = ids.clone()
        changed[:, at:] = (changed[:, at:] + 7) % VOCAB
        plan = _plan(mounted, changed)
        kept = _chunks_until(at, size)
        assert torch.equal(plan[:, :kept], before[:, :kept]), f"token {at} changed an earlier chunk"
        moved += int((plan != before).any())
        difference = float((_logits(mounted, changed)[:, :at] - logits[:, :at]).abs().max())
        assert difference < 1e-5, f"token {at} moved an earlier logit by {difference:.1e}"
    assert moved, "the check is void: no text changed any action"
    return f"{moved} of 4 texts changed the plan"


def plans_are_short(make: Make, arch: str) -> str:
    """No turn holds more different actions than `plan_length`, whatever is drawn."""
    mounted = _lively(make(tiny_model(arch)))
    limit, longest = mounted.router.limits.plan_length, 0
    for seed in range(4):
        plan = _plan(mounted, _ids(), _drawing(seed))
        longest = max(longest, int(plan[..., PLAN].max()), _longest_run(plan, mounted))
    assert longest <= limit, f"a turn holds {longest} actions, {limit} are allowed"
    return f"longest {longest}"


def flips_stay_in_budget(make: Make, arch: str) -> str:
    """Changes of expert never exceed burst + rate * chunks, at any chunk."""
    mounted = _lively(make(tiny_model(arch)))
    limits, most = mounted.router.limits, 0
    for seed in range(4):
        plan = _plan(mounted, _ids(), _drawing(seed))
        experts = plan[..., EXPERT]
        flips = (experts[:, 1:] != experts[:, :-1]).long().cumsum(1)
        assert torch.equal(flips.float(), plan[:, 1:, FLIPS]), "the record miscounts the flips"
        chunks = torch.arange(2, plan.shape[1] + 1)
        over = flips > limits.flip_burst + limits.flip_rate_max * chunks
        assert not over.any(), f"{int(flips.max())} flips in {plan.shape[1]} chunks"
        most = max(most, int(flips.max()))
    return f"at most {most}"


def equal_through_the_cache(make: Make, arch: str) -> str:
    """Token by token, in uneven pieces, cropped and copied: the same plan and the same logits."""
    mounted = _lively(make(tiny_model(arch)))
    ids = _ids()
    plan, full = _plan(mounted, ids), _logits(mounted, ids)
    worst = 0.0
    for cuts in (list(range(1, TOKENS)), [5, 13, 14, 31], [8, 16, 40]):
        logits, cache = _in_pieces(mounted, ids, cuts)
        assert torch.equal(_remembered(cache, mounted), plan), f"cut at {cuts[:4]}: another plan"
        worst = max(worst, float((logits - full).abs().max()))
    _, cache = _in_pieces(mounted, ids[:, :21], [13])
    twin = copy.deepcopy(cache)
    for each in (cache, twin):
        rest = _forward(mounted, ids[:, 21:], turn_starts=_turns(ids)[:, 21:], past_key_values=each)
        worst = max(worst, float((rest.logits - full[:, 21:]).abs().max()))
        assert torch.equal(_remembered(each, mounted), plan), "a copied cache gives another plan"
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def equal_in_a_batch(make: Make, arch: str) -> str:
    """Left-padded among others, each conversation gets the plan and the logits it gets alone."""
    mounted = _lively(make(tiny_model(arch)))
    ids, worst = _ids(), 0.0
    lengths = [TOKENS - 3 * row for row in range(ROWS)]
    mask = torch.stack([torch.arange(TOKENS) >= TOKENS - n for n in lengths]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    turns = _turns(ids) & mask.bool()
    given = {"attention_mask": mask, "position_ids": positions, "turn_starts": turns}
    whole = _forward(mounted, ids, use_cache=True, **given)
    plan = _remembered(whole.past_key_values, mounted)
    for row, length in enumerate(lengths):
        alone = _forward(
            mounted,
            ids[row : row + 1, -length:],
            turn_starts=turns[row : row + 1, -length:],
            use_cache=True,
        )
        own = _remembered(alone.past_key_values, mounted)[0]
        assert torch.equal(plan[row, : len(own)], own), f"row {row}: another plan in the batch"
        worst = max(worst, float((whole.logits[row, -length:] - alone.logits[0]).abs().max()))
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def equal_under_beams(make: Make, arch: str) -> str:
    """Beam search scores what a forward without cache scores."""
    mounted = _lively(make(tiny_model(arch)))
    mounted.base.generation_config.eos_token_id = None
    prompt = _ids()[:2, :13]
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
    plain = _forward(mounted, out.sequences, turn_starts=turns, use_cache=False).logits
    new = out.sequences[:, prompt.shape[1] :, None]
    wanted = plain[:, prompt.shape[1] - 1 : -1].log_softmax(-1).gather(-1, new)[..., 0]
    got = mounted.model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    worst = float((got - wanted).abs().max())
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def survives_unloading(make: Make, arch: str) -> str:
    """An expert taken away in the middle of a conversation: its users choose anew at the next chunk,
    the past stays, nobody else notices."""
    mounted = _lively(make(tiny_model(arch)))
    ids, turns = _ids(), _turns(_ids())
    before = _plan(mounted, ids)
    cut = 22
    _, cache = _in_pieces(mounted, ids[:, :cut], [13])
    held = _remembered(cache, mounted)
    gone = int(held[:, -1, EXPERT].mode().values) or 1
    mounted.unload(mounted.router.space.name(gone))
    out = _forward(mounted, ids[:, cut:], turn_starts=turns[:, cut:], past_key_values=cache)
    plan = _remembered(out.past_key_values, mounted)
    assert torch.isfinite(out.logits).all(), "a logit is not finite"
    assert torch.equal(plan[:, : held.shape[1]], held), "the past was revised"
    later = plan[:, held.shape[1] :, EXPERT]
    assert not (later == gone).any(), "an unloaded expert was chosen"
    untouched = ~(before[..., EXPERT] == gone).any(1) & ~(plan[..., EXPERT] == gone).any(1)
    fresh = _plan(mounted, ids)
    assert not (fresh[..., EXPERT] == gone).any(), "an unloaded expert was chosen from the start"
    return f"{int((held[:, -1, EXPERT] == gone).sum())} of {ROWS} followed it, {int(untouched.sum())} never did"


CHECKS: dict[str, Callable[[Make, str], str]] = {
    f.__name__: f
    for f in (
        same_seed_same_plan,
        prefix_causal,
        plans_are_short,
        flips_stay_in_budget,
        equal_through_the_cache,
        equal_in_a_batch,
        equal_under_beams,
        survives_unloading,
    )
}


# --- what the checks share ------------------------------------------------------------------------


def _lively(mounted: Mounted) -> Mounted:
    """Perturb experts and policy (from a fixed seed), so that plans differ from text to text."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for stack in mounted.stacks.values():
            stack.u.add_(0.05 * torch.randn(stack.u.shape, generator=generator))
            stack.canonicalise()
        actor, critic = mounted.router.policy.actor, mounted.router.policy.critic
        reader = mounted.router.policy.reader
        for layer in (reader.token, actor.net.out, critic.net.out):
            layer.weight.copy_(1.5 * torch.randn(layer.weight.shape, generator=generator))
    mounted.model.eval()
    return mounted


def _ids() -> Tensor:
    return torch.randint(3, VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(11))


def _turns(ids: Tensor) -> Tensor:
    turns = torch.zeros_like(ids, dtype=torch.bool)
    for at in TURNS:
        if at < ids.shape[1]:
            turns[:, at] = True
    return turns


def _drawing(seed: int) -> Chooser:
    generator = torch.Generator().manual_seed(seed)
    return lambda distribution: distribution.sample(generator)


@torch.no_grad()
def _forward(mounted: Mounted, ids: Tensor, **given: Any) -> Any:
    return mounted.model(input_ids=ids, **given)


def _logits(mounted: Mounted, ids: Tensor) -> Tensor:
    return _forward(mounted, ids, turn_starts=_turns(ids), use_cache=False).logits


def _plan(mounted: Mounted, ids: Tensor, chooser: Chooser | None = None) -> Tensor:
    """Records of all chunks of one pass over whole texts (rows, chunks, RECORD)."""
    with mounted.router.watched(chooser) as tape:
        _forward(mounted, ids, turn_starts=_turns(ids), use_cache=False)
    real = [step.record for step in tape if bool(step.real.all())]
    return torch.stack(real, 1)


def _in_pieces(mounted: Mounted, ids: Tensor, cuts: list[int]) -> tuple[Tensor, Any]:
    turns, parts, cache = _turns(ids), [], None
    for a, b in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = _forward(
            mounted,
            ids[:, a:b],
            turn_starts=turns[:, a:b],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1), cache


def _remembered(cache: Any, mounted: Mounted) -> Tensor:
    """Records of all chunks as the cache holds them (rows, chunks, RECORD)."""
    _, tails = cache.layers[-1].memory()
    return tails[:, 1:, :RECORD]  # slot 0 stands before the first token


def _chunks_until(token: int, size: int) -> int:
    """Chunks that begin at or before a token, whose action cannot depend on it."""
    begins = {0}
    for start, stop in zip((0, *TURNS), (*TURNS, TOKENS), strict=True):
        begins |= set(range(start, stop, size))
    return sum(b <= token for b in begins)


def _longest_run(plan: Tensor, mounted: Mounted) -> int:
    """Most different actions in a row between two turn starts, counted from the records' options."""
    options = plan[..., [EXPERT, RANK, STRENGTH]]
    size, longest = mounted.router.chunk_size, 0
    begins = sorted(
        {b for a, z in zip((0, *TURNS), (*TURNS, TOKENS), strict=True) for b in range(a, z, size)}
    )
    for row in options:
        count, last = 0, None
        for begin, action in zip(begins, row.tolist(), strict=True):
            count = 1 if begin in (0, *TURNS) else count + (action != last)
            longest, last = max(longest, count), action
    return longest
