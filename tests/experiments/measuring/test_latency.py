"""Arms take turns, and timing goes on while an answer is open."""

import time

import pytest
import torch
from torch import nn

import bem
from bem.adapters.copies import with_shared_weights
from bem.config import GatesConfig
from bem.errors import MeasurementError
from bem.experiments.measuring import latency as module
from bem.experiments.measuring.latency import Budget, measure_latency, rounds_wanted


@pytest.fixture
def arms(micro_llama):
    names = ("s0", "v1", "v4")
    return {name: bem.attach(with_shared_weights(micro_llama), name, rank=2) for name in names}


def test_every_round_times_every_arm_in_a_rotating_order(arms, monkeypatch):
    order = []
    real = module._round

    def watched(model, *rest):
        order.append(next(name for name, arm in arms.items() if arm.model is model))
        return real(model, *rest)

    monkeypatch.setattr(module, "_round", watched)
    timings = measure_latency(arms, rounds=4, prompt_tokens=20, new_tokens=3)
    warm_up, rounds = order[:3], [order[i : i + 3] for i in range(3, 15, 3)]
    assert warm_up == ["s0", "v1", "v4"]
    assert rounds == [
        ["s0", "v1", "v4"],
        ["v1", "v4", "s0"],
        ["v4", "s0", "v1"],
        ["s0", "v1", "v4"],
    ]
    for name in arms:
        assert {p: len(v) for p, v in timings.latency_ms[name].items()} == {
            "prefill": 4,
            "decode": 4,
        }
        for phase in ("prefill", "decode"):
            assert 0 < timings.p50_ms[name][phase] <= timings.p95_ms[name][phase]
    assert (timings.clock, timings.threads, timings.rounds) == ("cpu", 1, 4)


class Slow(nn.Module):
    """Takes a known time: `spin` seconds of work and `sleep` seconds of waiting per call."""

    def __init__(self, inner, spin=0.0, sleep=0.0):
        super().__init__()
        self.inner, self.config, self.spin, self.sleep = inner, inner.config, spin, sleep
        self.device = inner.device

    def forward(self, input_ids=None, past_key_values=None, use_cache=True):
        until = time.process_time() + self.spin
        while time.process_time() < until:
            pass
        time.sleep(self.sleep)
        return self.inner(input_ids=input_ids, past_key_values=past_key_values, use_cache=True)


def test_the_cpu_clock_counts_work_and_not_waiting(micro_llama):
    arms = {
        "plain": Slow(micro_llama),
        "busy": Slow(micro_llama, spin=0.03),
        "idle": Slow(micro_llama, sleep=0.03),
    }
    cpu = measure_latency(arms, rounds=2, prompt_tokens=8, new_tokens=2, clock="cpu").p50_ms
    assert cpu["busy"]["decode"] > cpu["plain"]["decode"] + 25
    assert cpu["idle"]["decode"] < cpu["plain"]["decode"] + 15
    wall = measure_latency(arms, rounds=2, prompt_tokens=8, new_tokens=2, clock="wall").p50_ms
    assert wall["idle"]["decode"] > 30


def test_threads_and_mode_are_given_back(arms):
    threads = torch.get_num_threads()
    measure_latency(arms, rounds=1, prompt_tokens=8, new_tokens=1)
    assert torch.get_num_threads() == threads


def test_what_cannot_be_timed_is_refused(arms):
    with pytest.raises(MeasurementError, match="No arms"):
        measure_latency({})
    with pytest.raises(
        MeasurementError, match=r"510 \+ 3 tokens exceed the model's context of 512"
    ):
        measure_latency(arms, prompt_tokens=510, new_tokens=3)
    with pytest.raises(MeasurementError, match="clock cuda needs a GPU"):
        measure_latency(arms, clock="cuda")


def test_copies_share_their_weights_and_carry_different_adapters(micro_llama, arms):
    pointers = {p.data_ptr() for p in micro_llama.parameters()}
    for arm in arms.values():
        own = {id(p) for p in arm.parameters()}
        frozen = [p for p in arm.base.parameters() if id(p) not in own]
        assert {p.data_ptr() for p in frozen} == pointers
    ids = torch.arange(5)[None]
    with torch.no_grad():
        arms["s0"].parameters()[0].add_(1)
        expected = micro_llama(input_ids=ids).logits
        torch.testing.assert_close(arms["v1"].model(input_ids=ids).logits, expected)


# --------------------------------------------------------------------------- while an answer is open


@pytest.fixture
def quick(monkeypatch):
    """Rounds that take no time: every sample is 1 ms."""
    taken = {"prefill": [1.0], "decode": [1.0]}
    monkeypatch.setattr(module, "_round", lambda *_: {k: list(v) for k, v in taken.items()})


SHORT = {"rounds": 2, "prompt_tokens": 8, "new_tokens": 1, "pairs": [("v1", "s0")]}


def test_rounds_go_on_while_they_are_wanted(arms, quick):
    looks = []

    def undecided(pairs):
        looks.append([(len(a), len(b)) for a, b in pairs])
        return 3 if len(looks) == 1 else 0

    seen = []
    timings = measure_latency(
        arms,
        **SHORT,
        undecided=undecided,
        budget=Budget(20),
        on_progress=lambda *at: seen.append(at),
    )
    assert timings.rounds == 5
    assert looks == [[(2, 2)] * 2, [(5, 5)] * 2]  # candidate and opponent, prefill and decode
    assert {len(r) for phases in timings.latency_ms.values() for r in phases.values()} == {5}
    assert seen == [(1, 2), (2, 2), (3, 5), (4, 5), (5, 5)]


def test_rounds_end_with_the_budget_though_the_answer_is_open(arms, quick):
    assert measure_latency(arms, **SHORT, undecided=lambda _: 99, budget=Budget(7)).rounds == 7
    no_time = Budget(7, seconds=0.0)
    assert measure_latency(arms, **SHORT, undecided=lambda _: 99, budget=no_time).rounds == 2
    assert measure_latency(arms, **SHORT, undecided=lambda _: 99).rounds == 2


def test_nothing_is_asked_without_pairs_and_unknown_arms_are_refused(arms, quick):
    alone = {**SHORT, "pairs": []}
    assert measure_latency(arms, **alone, undecided=lambda _: 99, budget=Budget(7)).rounds == 2
    with pytest.raises(MeasurementError, match=r"No arm 'v9' to time\. Arms: s0, v1, v4"):
        measure_latency(arms, **{**SHORT, "pairs": [("v9", "s0")]})


def paced(ratio, spread, rounds=20):
    """Candidate and baseline times whose ratios lie evenly around one, in logarithms."""
    steps = torch.linspace(-spread, spread, rounds).exp().tolist()
    return [ratio * step for step in steps], [1.0] * rounds


def test_no_rounds_are_wanted_once_the_limits_lie_on_one_side():
    gates = GatesConfig(latency_ratio_max=1.15)
    assert rounds_wanted([paced(1.05, 0.02), paced(1.30, 0.02)], gates) == 0
    assert rounds_wanted([], gates) == 0


def test_an_open_ratio_wants_more_rounds_the_nearer_it_lies_to_the_limit():
    gates = GatesConfig(latency_ratio_max=1.15)
    wanted = [rounds_wanted([paced(ratio, 0.2)], gates) for ratio in (1.10, 1.12, 1.15)]
    assert 0 < wanted[0] < wanted[1] <= wanted[2] == 20  # never more than there are
    assert rounds_wanted([paced(1.05, 0.02), paced(1.10, 0.2)], gates) == wanted[0]


def test_too_few_rounds_for_any_limit_want_as_many_again():
    assert rounds_wanted([paced(1.0, 0.01, rounds=3)], GatesConfig()) == 3
