"""What is explained is what happens."""

import torch

from bem.routing.explain import explain
from tests.conftest import make_llama
from tests.routing.mounted import mounted

IDS = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(1))[0].tolist()
TURNS = [i == 20 for i in range(40)]


def test_chunks_cover_the_text_and_name_what_was_executed():
    model = mounted(make_llama())
    found = explain(model, IDS, TURNS)
    assert [c.start for c in found] == [0, 8, 16, 20, 28, 36] and found[-1].stop == 40
    assert [c.turn for c in found] == [False, False, False, True, False, False]
    with model.router.watched() as tape, torch.no_grad():
        model.model(
            input_ids=torch.tensor([IDS]), turn_starts=torch.tensor([TURNS]), use_cache=False
        )
    for chunk, step in zip(found, tape, strict=False):
        assert chunk.expert == model.router.space.name(int(step.record[0, 0]))
        assert abs(sum(chunk.probabilities.values()) - 1) < 1e-5


def test_reasons_are_given():
    held = mounted(make_llama(), switch_cost=9.0)
    reasons = [c.why for c in explain(held, IDS, TURNS)]
    assert reasons[0].startswith("the conversation begins")
    assert any("hysteresis" in r for r in reasons[1:]) or any("span" in r for r in reasons[1:])
    untrained = explain(mounted(make_llama(), trained=False), IDS, TURNS)
    assert {(c.expert, c.why) for c in untrained} == {
        ("base", "the router is not trained: the bare base answers")
    }
    model = mounted(make_llama())
    model.unload("a")
    assert all(c.expert != "a" and "a" not in c.probabilities for c in explain(model, IDS, TURNS))
