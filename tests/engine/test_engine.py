"""The engine gives the tokens that `generate` gives, whatever else runs beside."""

import pytest
import torch

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import tiny_model
from bem.config import EVIDENCE_FEATURES
from bem.engine.engine import Engine
from bem.engine.request import Request
from tests.engine.plain import plain, prompts
from tests.routing.mounted import mounted

LENGTHS = (3, 17, 30, 9, 1, 24, 8, 41)
NEW = 21
EVIDENCE = [0.1 * i for i in range(1, 1 + len(EVIDENCE_FEATURES))]


def adapted(variant: str, architecture: str = "llama"):
    model = tiny_model(architecture)
    if variant == "router":
        return lively(mounted(model))
    if variant in ("s0", "v3"):
        return probe.perturbed(bem.attach(model, variant, rank=4))
    return probe.perturbed(bem.attach(model, variant, rank=4, chunk_size=8))


def lively(routed):
    """A router that changes its mind often."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weights in routed.router.policy.parameters():
            weights += 0.3 * torch.randn(weights.shape, generator=generator)
    return routed


def engine_of(subject, tokenizer, **options) -> Engine:
    return Engine(subject, tokenizer, **{"slots": 3, "prefill_tokens": 16, **options})


VARIANTS = ("s0", "pt1", "v1", "v2", "v3", "v4", "router")
CASES = [(v, a, 0.1) for v in VARIANTS for a in ("llama", "gpt2")]
CASES += [("v2", "llama", 0.0), ("router", "llama", 0.0)]


@pytest.mark.parametrize(("variant", "architecture", "cache_gib"), CASES)
def test_greedy_tokens_are_those_of_generate_while_others_join_and_leave(
    variant, architecture, cache_gib, tokenizer
):
    subject = adapted(variant, architecture)
    asked = prompts(*LENGTHS)
    wanted = [plain(subject, ids, NEW - i) for i, ids in enumerate(asked)]
    engine = engine_of(subject, tokenizer, cache_gib=cache_gib)
    requests = [
        Request(ids, max_new_tokens=NEW - i, ignore_eos=True) for i, ids in enumerate(asked)
    ]
    given = engine.generate(requests)
    assert [list(r.token_ids) for r in given] == wanted
    again = engine.generate(requests[::-1])  # warm, in another order
    assert [list(r.token_ids) for r in again] == wanted[::-1]
    if cache_gib:
        assert sum(r.cached_tokens for r in again) > 0


def test_an_engine_reads_from_a_store_that_another_filled_before_its_first_pass(tokenizer):
    """A server has an engine for each version, and one store."""
    asked = prompts(100)[0]
    first = engine_of(adapted("s0"), tokenizer, cache_gib=0.1)
    cold = first.generate([asked], max_new_tokens=NEW, ignore_eos=True)[0]
    second = engine_of(adapted("s0"), tokenizer, store=first.store)
    warm = second.generate([asked], max_new_tokens=NEW, ignore_eos=True)[0]
    assert warm.cached_tokens == 99 and warm.token_ids == cold.token_ids
