"""Versions side by side in one pass act as they do alone."""

import pytest
import torch

from bem.adapters.checks_models import tiny_model
from bem.engine.mixed import can_mix, mixed
from bem.engine.request import Request
from tests.engine.plain import plain, prompts
from tests.engine.test_chain import changed_expert
from tests.engine.test_engine import adapted, engine_of, lively
from tests.routing.mounted import mounted


def other_router(subject):
    """A shadow whose router decides otherwise."""
    shadow = subject.shadow()
    with torch.no_grad():
        for weights in shadow.router.policy.parameters():
            weights += 0.3 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(8))
    return shadow


@pytest.mark.parametrize("numbers", [(0, 1, 2, 0, 1, 2), (0, 0, 1, 1, 1, 2)])
def test_rows_under_three_versions_share_every_pass_and_keep_their_own_tokens(numbers, tokenizer):
    """Whether the rows of a version stand side by side or not."""
    subject = adapted("router")
    releases = [subject.shadow(), changed_expert(subject, "c"), other_router(subject)]
    asked = prompts(20, 33, 9, 14, 27, 12)
    wanted = [plain(releases[numbers[i]], ids, 30) for i, ids in enumerate(asked)]
    assert wanted != [plain(releases[0], ids, 30) for ids in asked]
    engine = engine_of(subject, tokenizer, slots=6, prefill_tokens=200)
    asks = []
    for i, ids in enumerate(asked):
        subject.adopt(releases[numbers[i]])
        asks.append(engine.submit(Request(ids, max_new_tokens=30, ignore_eos=True)))
        engine.step()
    assert engine.step().passes == 1
    results = {}
    while engine.busy:
        results |= {r.id: r for r in engine.step().finished}
    assert [list(results[n].token_ids) for n in asks] == wanted


def test_only_states_of_one_form_are_mixed_and_a_pack_alone_stays_itself():
    pack = adapted("router").pack
    assert mixed([pack, pack], torch.device("cpu")) is pack
    assert can_mix(pack, lively(mounted(tiny_model("llama"))).pack)
    assert not can_mix(pack, mounted(tiny_model("llama"), chunk_size=16).pack)
