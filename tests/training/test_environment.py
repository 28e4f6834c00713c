"""Episodes are real generations, and rewards are sums that can be checked by hand."""

import numpy as np
import pytest
import torch

from bem.config import RewardConfig
from bem.training.gae import gae, span_rewards
from tests.conftest import make_llama
from tests.routing.mounted import mounted
from tests.training.episodes import EXAMPLES, PROMPTS, environment


def roll(env, seed=0):
    return env.rollout(EXAMPLES, PROMPTS, torch.Generator().manual_seed(seed))


def test_the_return_is_the_score_minus_flips_and_ranks():
    env = environment()
    rollout = roll(env)
    assert len(rollout.returns) == 6 and len(rollout.durations) == len(rollout.actions)
    assert len(rollout.rewards) == rollout.durations.sum()
    ends = np.flatnonzero(rollout.ends)
    assert len(ends) == 6 and rollout.rewards.sum() == pytest.approx(rollout.returns.sum())
    assert rollout.durations.sum() == rollout.expert_chunks.sum()
    ranks = np.array(env.mounted.router.space.ranks) / env.mounted.router.space.ranks[-1]
    first = 0
    for end, total in zip(ends, rollout.returns, strict=True):
        flips = 0
        actions = rollout.actions[first : end + 1]
        for before, after in zip(actions[:-1, 0], actions[1:, 0], strict=True):
            flips += int(before != after)
        cost = sum(
            0.125 * ranks[int(a[2])] * d * (a[0] > 0)
            for a, d in zip(actions, rollout.durations[first : end + 1], strict=True)
        )
        assert total == pytest.approx(0.5 - 0.25 * flips - float(cost), abs=1e-6)
        first = end + 1


def test_log_probabilities_are_those_of_what_was_executed():
    env = environment()
    rollout = roll(env)
    actor = env.mounted.router.policy.actor
    again = actor.distribution(rollout.observations, rollout.masks).log_prob(rollout.actions)
    torch.testing.assert_close(again, rollout.log_probs, atol=1e-5, rtol=0)
    for mask, action in zip(rollout.masks, rollout.actions.T, strict=True):
        assert mask.gather(1, action[:, None]).all()


def test_the_same_seed_draws_the_same_episodes():
    env = environment()
    one, two, other = roll(env), roll(env), roll(env, 1)
    assert torch.equal(one.actions, two.actions) and one.answers == two.answers
    assert one.actions.shape != other.actions.shape or not torch.equal(one.actions, other.actions)


def test_episodes_do_not_depend_on_the_bases_generation_config():
    """As Qwen2.5-Instruct and others ship it: penalties, forbidden tokens, sampling."""
    plain, env = environment(), environment()
    expected = roll(plain)
    config = env.mounted.base.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size = 5.0, 2
    config.suppress_tokens, config.do_sample, config.temperature = [5, 6, 7], True, 2.0
    config.num_beams, config.min_new_tokens = 2, 3
    rollout = roll(env)
    assert rollout.answers == expected.answers
    assert torch.equal(rollout.actions, expected.actions)


def test_nobody_listens_when_the_episodes_are_over():
    env = environment()
    roll(env)
    assert env.mounted.router.tape is None


def credit(spans: tuple[int, ...], score: float) -> list[float]:
    """What the first decision of every episode is credited with: expert a throughout, spans of one length."""
    model = mounted(make_llama(), spans=spans, ranks=(4,), strengths=(1.0,), plan_length=99)
    model.router.available[2:] = False
    model.router.available[0] = False
    env = environment(lambda row, answer: {"quality": score}, model)
    rollout = roll(env)
    assert set(rollout.durations) <= set(range(1, spans[0] + 1))
    assert rollout.durations.max() == spans[0] and (rollout.actions[:, 0] == 1).all()
    nothing = np.zeros(len(rollout.durations))
    rewards = span_rewards(rollout.rewards, rollout.durations, 0.9)
    never = nothing.astype(bool)
    found = gae(rewards, nothing, rollout.durations, rollout.ends, never, nothing, 0.9, 1.0)
    begins = [0, *(np.flatnonzero(rollout.ends)[:-1] + 1)]
    return found.advantages[begins].tolist()


def test_one_span_of_two_chunks_is_worth_two_spans_of_one():
    """The same conversations, answers and costs; only how often the router is asked differs."""
    single, double = credit((1,), 0.5), credit((2,), 0.5)
    assert double == pytest.approx(single, abs=1e-12)
    assert single != pytest.approx(credit((1,), 0.4))


def test_the_answer_is_paid_at_its_last_chunk():
    env = environment(lambda row, answer: {"quality": 0.5})
    env.reward = RewardConfig(quality=1.0, validity=0.0, flip_cost=0.0, rank_cost=0.0)
    rollout = roll(env)
    paid = np.zeros(len(rollout.rewards))
    paid[np.cumsum(rollout.durations)[rollout.ends] - 1] = 0.5
    assert np.array_equal(rollout.rewards, paid)
