"""A probe says what its numbers say, belongs to one base, and is whole or refused on disk."""

import json
import math

import numpy as np
import pytest

from bem.adapters.version import base_digest
from bem.errors import BaseMismatch, CheckpointError
from bem.safety.detector import ViolationDetector
from bem.safety.probe import HiddenProbe, Probe, read_probe, write_probe
from tests.conftest import make_llama, make_tokenizer

D = 32


def make_probe(model, pool="last") -> Probe:
    rng = np.random.default_rng(0)
    weights, centre = (rng.normal(size=D).astype(np.float32) for _ in range(2))
    spread = np.full(D, 2.0, np.float32)
    return Probe(base_digest(model), 1, pool, weights, centre, spread, 0.5, 2.0, -1.0, {"rows": 3})


def test_log_odds_are_those_of_the_formula():
    probe = make_probe(make_llama())
    state = np.ones(D, np.float32)
    by_hand = sum(w * (1 - c) / 2 for w, c in zip(probe.weights.tolist(), probe.centre.tolist(), strict=True))  # fmt: skip
    assert probe.log_odds(state) == pytest.approx(2 * (by_hand + 0.5) - 1, rel=1e-5)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_the_states_are_those_of_a_plain_forward_pass(pool):
    model, tokenizer = make_llama(), make_tokenizer()
    probe = make_probe(model, pool)
    ids = tokenizer("name the value", return_tensors="pt")["input_ids"]
    states = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0].detach()
    wanted = states[-1] if pool == "last" else states[1:].mean(0)
    hidden = HiddenProbe(model, tokenizer, probe)
    assert hidden.log_odds("name the value") == pytest.approx(
        probe.log_odds(wanted.numpy()), abs=1e-4
    )
    odds = hidden.log_odds("name the value")
    assert hidden.score("name the value") == pytest.approx(1 / (1 + math.exp(-odds)))
    words = ViolationDetector()
    p = words.check("name the value").scores["harm"]
    joint = (odds + math.log(p / (1 - p))) / 2
    together = HiddenProbe(model, tokenizer, probe, words)
    assert together.score("name the value") == pytest.approx(1 / (1 + math.exp(-joint)), abs=1e-6)
    assert together.score("x" * 300_000) == 1.0  # what words could not check


def test_a_probe_of_another_base_is_refused():
    probe = make_probe(make_llama())
    with pytest.raises(BaseMismatch, match="trained on base"):
        HiddenProbe(make_llama(num_hidden_layers=2), make_tokenizer(), probe)


def test_it_comes_back_from_disk_and_a_changed_one_does_not(tmp_path):
    model = make_llama()
    probe = make_probe(model)
    write_probe(tmp_path, probe)
    back = read_probe(tmp_path)
    assert np.array_equal(back.weights, probe.weights) and back.about == {"rows": 3}
    raw = bytearray((tmp_path / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="train it again"):
        read_probe(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError):
        read_probe(tmp_path)


def test_the_probe_that_ships_is_whole_and_small():
    probe = read_probe()
    assert (
        probe.weights.shape == probe.centre.shape == (576,)
        and probe.about["base"] == "smollm2-135m"
    )
    assert (probe.spread > 0).all()
