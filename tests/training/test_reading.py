"""The reader learns a cue of a few words that stands turns before the answer it decides."""

import numpy as np
import torch

from bem.config import CloningConfig, ReadingConfig
from bem.training.data import Example, encode
from bem.training.reading import expected_regret, hidden_states, learn_to_read
from bem.training.traces import trace
from tests.conftest import make_llama, make_tokenizer
from tests.routing.mounted import mounted

CONFIG = CloningConfig(switch_cost=0.0)
FILLER = "return the value. "


def rows():
    """Two turns; a cue at the very beginning says which expert is to answer the second one."""
    for n in range(96):
        kind = n % 2
        first = ("json " if kind else "name ") + FILLER + "abcdefgh"[n % 8] + "klmnop"[n // 8 % 6]
        row = Example(str(n), FILLER, ("that",), history=((first, "this"),))
        yield kind, encode(row, make_tokenizer(), 400)


def test_a_cue_is_heard_and_remembered():
    kinds, encoded = zip(*rows(), strict=True)
    model = mounted(make_llama(), router_layer=1)
    traces = trace(model, encoded, 0, CONFIG, experts_alone=True)
    path = np.repeat(1 + np.array(kinds)[:, None], traces.path.shape[1], 1)
    traces = type(traces)(**{**vars(traces), "path": path})
    held = torch.arange(96) % 6 >= 4
    reading = ReadingConfig(tries=2, epochs=20, batch_size=8, learning_rate=1e-2, dropout=0.0)
    settings = CONFIG.model_copy(update={"reading": reading, "regret": 0.0})
    said: list[str] = []
    with model.training("router"):
        curve = learn_to_read(model, encoded, traces, held, 0, settings, 0, said.append)
    assert len(curve) == 20 and len(said) == 40
    assert curve[0][1] > 0.6 and min(held for _, held in curve) < 0.1  # chance: ln 2 = 0.69


def test_expected_regret_is_what_the_drawn_expert_loses():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
    losses = torch.tensor([[1.0, 1.5, 0.5], [0.2, 0.2, 9.2]])
    found = expected_regret(logits, losses, largest=3.0)
    torch.testing.assert_close(found, torch.tensor([0.75, 1.0]))  # (.5 + 1) / 2, 3 / 3


def test_hidden_states_are_those_of_the_whole_model_and_of_no_expert():
    model = make_llama()
    encoded = [e for _, e in rows()][:5]
    expected = []
    with torch.no_grad():
        for row in encoded:
            every = model(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
            expected.append(every[1][0])
    found = dict(hidden_states(mounted(model, router_layer=1).base, encoded, 1, 0, 2))
    for i in range(5):
        torch.testing.assert_close(found[i], expected[i], atol=1e-5, rtol=1e-4)
