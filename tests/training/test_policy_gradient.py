"""AR1 climbs, stays in its trust region, and resumes to the bit."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bem.config import RewardConfig
from bem.errors import Diverged, TrainingError
from bem.routing.action import EXPERT
from bem.training import policy_gradient
from bem.training.policy_gradient import improve
from bem.training.state import METRICS, STATE
from tests.conftest import make_llama
from tests.routing.mounted import mounted
from tests.training.episodes import CONFIG, EXAMPLES, PROMPTS, environment


def train(folder, env=None, on_progress=None, seed=1, examples=EXAMPLES, **changes):
    config = CONFIG.model_copy(update=changes)
    return improve(env or environment(), examples, PROMPTS, config, folder, seed, on_progress)


def stop_after(number):
    def on_progress(iteration):
        if iteration.iteration == number:
            raise KeyboardInterrupt

    return on_progress


def policy_of(env):
    return {n: t.clone() for n, t in env.mounted.router.policy.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    folder, env = tmp_path_factory.mktemp("whole"), environment()
    train(folder, env)
    return SimpleNamespace(policy=policy_of(env), value=value_of(folder), rows=rows(folder))


def rows(folder: Path):
    """Metrics but for the time they took."""
    lines = (folder / METRICS).read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


def value_of(folder: Path):
    return torch.load(folder / STATE, weights_only=True)["value"]


def test_a_reward_for_one_expert_makes_it_the_rule(tmp_path):
    """The score is the share of the last episode's answer chunks under expert a."""
    model = mounted(make_llama(), chunk_size=8, plan_length=9, flip_burst=9)
    model.router.limits = replace(model.router.limits, switch_cost=-99.0)  # no rule in the way
    env = environment(model=model)
    env.max_new_tokens = 2
    env.reward = RewardConfig(quality=1.0, validity=0.0, flip_cost=0.0, rank_cost=0.0)
    chosen: list[float] = []
    answer = env._answer

    def watched(prompts, generator):
        for episode in answer(prompts, generator):
            chosen.append(float(episode.chunks[-1].record[EXPERT] == 1))
            yield episode

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


def test_a_policy_that_has_collapsed_raises_the_alarm(tmp_path):
    env = environment()
    with torch.no_grad():
        env.mounted.router.policy.actor.net.out.bias[2] = 50.0  # always expert b
    config = CONFIG.model_copy(update={"iterations": 1, "collapse_share": 0.5})
    (done,) = improve(env, EXAMPLES, PROMPTS, config, tmp_path, 0)
    assert "b governs" in done.alarm


# -------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_stopped_after_any_iteration_ends_with_the_same_bits(tmp_path, whole, stop):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, environment(), stop_after(stop))
    env = environment()
    torch.manual_seed(99)  # whatever the process drew before must not matter
    train(tmp_path, env)
    assert same(policy_of(env), whole.policy)
    assert same(value_of(tmp_path), whole.value)
    assert rows(tmp_path) == whole.rows


@pytest.mark.parametrize("part", ["rollout", "actor", "value"])
def test_a_run_killed_inside_an_iteration_ends_with_the_same_bits(
    tmp_path, whole, monkeypatch, part
):
    """Also in the process that goes on: the router is as the last finished iteration left it."""
    env, calls = environment(), []

    def dies_in_the_second(call):
        def wrapped(*args, **kwargs):
            calls.append(part)
            result = call(*args, **kwargs)  # what it did to the weights is done
            if len(calls) == 2:
                raise KeyboardInterrupt
            return result

        return wrapped

    with monkeypatch.context() as patch:
        if part == "rollout":
            patch.setattr(env, "rollout", dies_in_the_second(env.rollout))
        elif part == "actor":
            optimizer = policy_gradient.TRPOOptimizer
            patch.setattr(optimizer, "step", dies_in_the_second(optimizer.step))
        else:
            fit_value = policy_gradient.fit_value
            patch.setattr(policy_gradient, "fit_value", dies_in_the_second(fit_value))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, env)
    assert len(rows(tmp_path)) == 1
    saved = torch.load(tmp_path / STATE, weights_only=True)["policy"]
    assert same(policy_of(env), saved)
    train(tmp_path, env)
    assert same(policy_of(env), whole.policy)
    assert rows(tmp_path) == whole.rows


def test_metrics_that_a_kill_left_behind_the_state_are_made_good(tmp_path):
    train(tmp_path, iterations=2)
    expected = rows(tmp_path)
    (tmp_path / METRICS).write_text((tmp_path / METRICS).read_text().splitlines()[0] + "\n")
    train(tmp_path, iterations=2)
    assert rows(tmp_path) == expected


def test_more_iterations_go_on_and_fewer_are_refused_because_weights_cannot_be_taken_back(
    tmp_path, whole
):
    env = environment()
    train(tmp_path, iterations=2)
    with pytest.raises(TrainingError, match=r"after 2 iterations, 1 are asked for.* delete"):
        train(tmp_path, iterations=1)
    train(tmp_path, env)
    assert same(policy_of(env), whole.policy)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 0.9999])
def test_half_a_state_is_recognised(tmp_path, share):
    train(tmp_path, iterations=1)
    content = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(content[: int(share * len(content))])
    with pytest.raises(TrainingError, match=r"state\.pt is half written.* Delete it"):
        train(tmp_path)


def test_a_full_disk_is_a_training_error_and_leaves_the_last_state_whole(
    tmp_path, whole, monkeypatch
):
    train(tmp_path, iterations=1)

    env = environment()
    rollout = env.rollout

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fills_the_disk(*args):
        patch.setattr(os, "fsync", full)
        return rollout(*args)

    env.rollout = fills_the_disk
    message = r"no space is left.* after iteration 1 is whole"
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=message):
        train(tmp_path, env)
    train(tmp_path)
    assert rows(tmp_path) == whole.rows


def test_a_failed_value_fit_does_not_leave_a_stepped_actor(tmp_path, monkeypatch):
    env = environment()
    before = policy_of(env)

    def diverges(*args):
        raise Diverged("the critic diverged")

    monkeypatch.setattr(policy_gradient, "fit_value", diverges)
    with pytest.raises(Diverged):
        train(tmp_path, env)
    assert same(policy_of(env), before)


# ----------------------------------------------------------------------------- what a state is for


def other_base():
    model = make_llama()
    model.model.norm.weight.data += 1
    return environment(model=mounted(model, chunk_size=8))


def other_rules():
    env = environment()
    env.mounted.router.limits = replace(env.mounted.router.limits, plan_length=1)
    return env


def other_start():
    env = environment()
    env.mounted.router.policy.actor.net.out.bias.data[0] += 1.0
    return env


def other_expert():
    model = mounted(make_llama(), chunk_size=8)
    model.experts[0] = replace(model.experts[0], digest="another")
    return environment(model=model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda: {"seed": 2}, "seed was 1, is 2"),
        (lambda: {"delta": 0.5}, r"policy_gradient\.delta was 0\.01, is 0\.5"),
        (lambda: {"examples": [*EXAMPLES[1:], EXAMPLES[0]]}, "data was"),
        (lambda: {"env": other_base()}, "base was"),
        (lambda: {"env": other_rules()}, "rules was"),
        (lambda: {"env": other_expert()}, "experts was"),
        (lambda: {"env": other_start()}, "begun from other weights"),
    ],
)
def test_a_state_of_another_run_is_refused_with_what_differs(tmp_path, changes, message):
    train(tmp_path, iterations=1)
    train(tmp_path, iterations=1)  # the same run is finished
    with pytest.raises(TrainingError, match=message):
        train(tmp_path, **changes())


def test_every_conversation_needs_its_prompt(tmp_path):
    for examples, prompts in ((EXAMPLES, PROMPTS[1:]), ([], [])):
        with pytest.raises(TrainingError, match="one prompt for each"):
            improve(environment(), examples, prompts, CONFIG, tmp_path, 0)
