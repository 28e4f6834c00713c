"""The reader learns a cue of a few words that stands turns before the answer it decides."""

import numpy as np
import pytest
import torch

from bem.config import CloningConfig, ReadingConfig
from bem.errors import TrainingError
from bem.training.data import Example, encode
from bem.training.reader import expected_regret, train_reader
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


def test_a_cue_at_the_beginning_decides_the_expert_turns_later():
    kinds, encoded = zip(*rows(), strict=True)
    model = mounted(make_llama(), router_layer=1)
    traces = trace(model, encoded, 0, CONFIG, experts_alone=True)
    path = np.repeat(1 + np.array(kinds)[:, None], traces.path.shape[1], 1)
    traces = type(traces)(**{**vars(traces), "path": path})
    validation = [i for i in range(96) if i % 6 >= 4]
    train = [i for i in range(96) if i % 6 < 4]
    reading = ReadingConfig(tries=2, epochs=20, batch_size=8, learning_rate=1e-2, dropout=0.0)
    settings = CONFIG.model_copy(update={"reading": reading, "regret": 0.0})
    messages: list[str] = []
    with model.training("router"):
        curve = train_reader(
            model, encoded, traces, train, validation, 0, settings, 0, messages.append
        )
    assert len(curve) == 20 and len(messages) == 40
    assert curve[0][1] > 0.6 and min(loss for _, loss in curve) < 0.1  # chance: ln 2 = 0.69


def test_expected_regret_is_what_the_drawn_expert_loses():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
    losses = torch.tensor([[1.0, 1.5, 0.5], [0.2, 0.2, 9.2]])
    regret = expected_regret(logits, losses, largest=3.0)
    torch.testing.assert_close(regret, torch.tensor([0.75, 1.0]))  # (.5 + 1) / 2, 3 / 3


def test_a_split_without_answers_is_an_error_before_anything_is_trained():
    _, encoded = zip(*list(rows())[:8], strict=True)
    model = mounted(make_llama(), router_layer=1)
    traces = trace(model, encoded, 0, CONFIG, experts_alone=True)
    traces.answers[6:] = False
    before = {n: t.clone() for n, t in model.router.policy.state_dict().items()}
    with model.training("router"), pytest.raises(TrainingError, match="no answer on one side"):
        train_reader(model, encoded, traces, range(6), [6, 7], 0, CONFIG, 0, lambda text: None)
    after = model.router.policy.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
