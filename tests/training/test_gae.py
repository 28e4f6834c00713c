from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bem.training.gae import gae, span_rewards


def rollout(seed, steps=12, spans=4) -> dict[str, Any]:
    """Random decisions with a terminated, a truncated and a doubly marked end inside."""
    rng = np.random.default_rng(seed)
    terminated, truncated = np.zeros(steps, bool), np.zeros(steps, bool)
    terminated[[3, 8]] = True
    truncated[[6, 8, steps - 1]] = True
    return {
        "rewards": rng.normal(size=steps),
        "values": rng.normal(size=steps),
        "durations": rng.integers(1, spans + 1, steps),
        "terminated": terminated,
        "truncated": truncated,
        "bootstrap": rng.normal(size=steps),
    }


def episode_end(data, k):
    """First decision from k on at which the episode stops, and the value of what follows it."""
    stops = data["terminated"] | data["truncated"]
    end = k + int(np.argmax(stops[k:]))
    return end, 0.0 if data["terminated"][end] else data["bootstrap"][end]


def n_step_advantage(data, k, n, gamma):
    """Rewards of n decisions, then the critic (or the episode's end), minus V(s_k)."""
    end, after = episode_end(data, k)
    total, discount = 0.0, 1.0
    for j in range(k, min(k + n - 1, end) + 1):
        total += discount * data["rewards"][j]
        discount *= gamma ** int(data["durations"][j])
    rest = after if k + n - 1 >= end else data["values"][k + n]
    return total + discount * rest - data["values"][k]


def test_hand_computed_numbers_with_a_long_span():
    found = gae(
        rewards=[1.0, 2.0, 3.0],
        values=[0.5, 1.0, 4.0],
        durations=[2, 1, 3],
        terminated=[False, True, False],
        truncated=[False, False, True],
        bootstrap=[99.0, 99.0, 8.0],
        gamma=0.5,
        lam=0.5,
    )
    # k=2: 3 + 8/8 - 4 = 0.   k=1: 2 - 1 = 1.   k=0: 1 + 1/4 - 0.5 + (1/4)(1/2)(1) = 0.875
    assert found.advantages.tolist() == [0.875, 1.0, 0.0]
    assert found.targets.tolist() == [1.375, 2.0, 4.0]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0), st.floats(0.0, 0.99), st.sampled_from([1, 4]))
def test_it_is_the_lambda_mixture_of_n_decision_advantages(seed, gamma, lam, spans):
    """(1 - lambda) sum_n lambda^(n-1) A^(n), with spans of 1 (the textbook's case) or more."""
    data = rollout(seed, spans=spans)
    found = gae(**data, gamma=gamma, lam=lam)
    for k in range(12):
        last = episode_end(data, k)[0] - k + 1  # from here on all n give the same
        parts = [n_step_advantage(data, k, n, gamma) for n in range(1, last + 1)]
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, last)] + [lam ** (last - 1)]
        assert found.advantages[k] == pytest.approx(np.dot(weights, parts), abs=1e-9)


def test_lambda_one_is_the_discounted_return_minus_the_value():
    data = rollout(1)
    found = gae(**data, gamma=0.9, lam=1.0)
    expected = [n_step_advantage(data, k, 100, 0.9) for k in range(12)]
    assert found.advantages == pytest.approx(np.array(expected))
    assert found.targets == pytest.approx(np.array(expected) + data["values"])


def test_lambda_zero_is_the_one_decision_temporal_difference():
    data = rollout(2)
    expected = [n_step_advantage(data, k, 1, 0.9) for k in range(12)]
    assert gae(**data, gamma=0.9, lam=0.0).advantages == pytest.approx(np.array(expected))


def test_streams_side_by_side_equal_streams_one_by_one():
    first, second = rollout(3), rollout(4)
    both = {name: np.stack([first[name], second[name]], 1) for name in first}
    together = gae(**both).advantages
    assert together[:, 0].tolist() == gae(**first).advantages.tolist()
    assert together[:, 1].tolist() == gae(**second).advantages.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truncated": np.zeros(12, bool)}, "neither terminated nor truncated"),
        ({"durations": np.zeros(12)}, "at least 1 chunk, got 0"),
        ({"rewards": np.full(12, np.nan)}, "12 of rewards are not finite"),
        ({"values": np.zeros(3)}, "alike"),
        ({"gamma": 1.5}, "gamma and lam must lie in"),
    ],
)
def test_what_cannot_be_estimated_is_refused(changes, message):
    arguments = rollout(0) | changes
    with pytest.raises(ValueError, match=message):
        gae(**arguments)


# ---------------------------------------------------------------------------------- rewards of spans


def test_the_reward_of_a_span_is_discounted_to_its_decision():
    rewards, durations = [1.0, 2.0, 4.0, 8.0, 16.0], [3, 1, 1]
    # 1 + 2/2 + 4/4, then 8, then 16
    assert span_rewards(rewards, durations, gamma=0.5).tolist() == [3.0, 8.0, 16.0]
    assert span_rewards(rewards, durations, gamma=1.0).tolist() == [7.0, 8.0, 16.0]
    assert span_rewards(rewards, durations, gamma=0.0).tolist() == [1.0, 8.0, 16.0]


def first_return(rewards, durations, gamma):
    """What the first decision is credited with, where no value estimate has a part (V = 0, lambda 1)."""
    n, nothing = len(durations), np.zeros(len(durations))
    ends = np.arange(n) == n - 1
    spans = span_rewards(rewards, durations, gamma)
    found = gae(spans, nothing, durations, ends, nothing.astype(bool), nothing, gamma, 1.0)
    return found.advantages[0]


def test_one_span_of_two_is_worth_two_spans_of_one():
    rewards = [-0.005, 0.995]  # ranks cost .005 a chunk, the answer is worth 1
    by_hand = -0.005 + 0.99 * 0.995
    assert first_return(rewards, [2], 0.99) == pytest.approx(by_hand, abs=1e-12)
    assert first_return(rewards, [1, 1], 0.99) == pytest.approx(by_hand, abs=1e-12)


@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_credit_does_not_depend_on_how_the_same_chunks_are_cut_into_spans(seed, gamma):
    rng = np.random.default_rng(seed)
    durations = rng.integers(1, 5, rng.integers(1, 6))
    rewards = rng.normal(size=durations.sum())
    expected = sum(gamma**t * r for t, r in enumerate(rewards))
    assert first_return(rewards, durations, gamma) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("durations", [[2, 1], [4], [3, 0], [[3]]])
def test_spans_that_do_not_cover_the_chunks_are_refused(durations):
    with pytest.raises(ValueError, match="add up to the"):
        span_rewards([1.0, 1.0, 1.0, 1.0][: 4 if durations != [4] else 3], durations, 0.9)
