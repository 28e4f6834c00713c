"""Episodes are real generations; rewards are sums that can be checked by hand; AR1 resumes to the bit."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bem.config import PolicyGradientConfig, RewardConfig
from bem.errors import TrainingError
from bem.routing.action import EXPERT
from bem.training.data import Example, encode
from bem.training.environment import Environment
from bem.training.policy_gradient import METRICS, improve, leave_one_out
from tests.conftest import make_llama, make_tokenizer
from tests.routing.mounted import mounted

TOKENIZER = make_tokenizer()
EXAMPLES = [Example(str(n), "name the function. " * (1 + n % 3), ("that",)) for n in range(6)]
PROMPTS = [encode(e, TOKENIZER, 256, with_answer=False) for e in EXAMPLES]
REWARD = RewardConfig(quality=1.0, validity=0.0, flip_cost=0.25, rank_cost=0.125)
CONFIG = PolicyGradientConfig(
    iterations=3,
    episodes=6,
    samples=2,
    batch_size=3,
    max_new_tokens=12,
    reward=REWARD,
    damping=0.01,
)


def environment(score=lambda row, answer: {"quality": 0.5}, model=None) -> Environment:
    torch.manual_seed(0)
    model = model or mounted(make_llama(), chunk_size=8)
    return Environment(model, TOKENIZER, score, REWARD, CONFIG.max_new_tokens, CONFIG.batch_size)


def roll(env, seed=0):
    return env.rollout(EXAMPLES, PROMPTS, torch.Generator().manual_seed(seed))


def test_the_return_is_the_score_minus_flips_and_ranks():
    env = environment()
    rollout = roll(env)
    assert len(rollout.returns) == 6 and len(rollout.rewards) == len(rollout.actions)
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


def test_nobody_listens_when_the_episodes_are_over():
    env = environment()
    roll(env)
    assert env.mounted.router.tape is None


def test_a_reward_for_one_expert_makes_it_the_rule(tmp_path):
    """The score is the share of the last episode's answer chunks under expert a."""
    model = mounted(make_llama(), chunk_size=8, plan_length=9, flip_burst=9)
    model.router.limits = replace(model.router.limits, switch_cost=-99.0)  # no rule in the way
    env = environment(model=model)
    env.reward = RewardConfig(quality=1.0, validity=0.0, flip_cost=0.0, rank_cost=0.0)
    chosen: list[float] = []
    answer = env._answer

    def watched(prompts, generator):
        for chunks, text in answer(prompts, generator):
            last = chunks[-1]
            chosen.append(float(last.step.record[last.row, EXPERT] == 1))
            yield chunks, text

    env._answer = watched
    order = sorted(range(6), key=lambda i: len(PROMPTS[i]))

    def score(row, text):
        return {"quality": chosen[-6:][order.index(int(row.id))]}

    env.score = score
    config = CONFIG.model_copy(update={"iterations": 60, "samples": 1, "delta": 0.05})
    done = improve(env, EXAMPLES, PROMPTS, config, tmp_path, seed=0)
    early = np.mean([i.reward for i in done[:5]])
    late = np.mean([i.reward for i in done[-5:]])
    assert late > early + 0.2
    assert all(i.kl <= 0.05 for i in done) and any(i.accepted for i in done)


def test_every_answer_is_judged_against_the_others_to_its_question():
    returns = np.array([1.0, 0.0, 0.5, 0.2, 0.2, 0.2])
    expected = [0.25, 0.75, 0.5, 0.2, 0.2, 0.2]  # means of the two others
    assert leave_one_out(returns, 3) == pytest.approx(expected)
    assert (leave_one_out(returns, 1) == 0).all()
    with pytest.raises(ValueError, match="multiple of samples"):
        PolicyGradientConfig(episodes=6, samples=4)


def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path):
    def train(folder, stop=None):
        def interrupt(iteration):
            if iteration.iteration == stop:
                raise KeyboardInterrupt

        try:
            improve(environment(), EXAMPLES, PROMPTS, CONFIG, folder, 1, interrupt)
        except KeyboardInterrupt:
            improve(environment(), EXAMPLES, PROMPTS, CONFIG, folder, 1)
        return (folder / METRICS).read_text()

    whole = [json.loads(line) for line in train(tmp_path / "whole").splitlines()]
    parts = [json.loads(line) for line in train(tmp_path / "parts", 2).splitlines()]
    for one, two in zip(whole, parts, strict=True):
        one.pop("seconds"), two.pop("seconds")
        assert one == two


def test_a_folder_of_another_run_is_refused(tmp_path):
    improve(environment(), EXAMPLES, PROMPTS, CONFIG, tmp_path, 1)
    with pytest.raises(TrainingError, match="other settings"):
        improve(environment(), EXAMPLES, PROMPTS, CONFIG, tmp_path, 2)


def test_a_policy_that_has_collapsed_raises_the_alarm(tmp_path):
    env = environment()
    with torch.no_grad():
        env.mounted.router.policy.actor.net.out.bias[2] = 50.0  # always expert b
    config = CONFIG.model_copy(update={"iterations": 1, "collapse_share": 0.5})
    (done,) = improve(env, EXAMPLES, PROMPTS, config, tmp_path, 0)
    assert "b governs" in done.alarm
