import json
from dataclasses import replace

import pytest
import torch

from bem.config import OnlineConfig
from bem.online.judge import Judge
from bem.online.learner import Learner
from bem.online.replay import Item
from bem.online.trial import HELD, TRUSTED, Trial
from tests.online.toys import CONFIG, SKILLS, Toy, loop, moves, stream


def version(*numbers):
    return {"w": torch.tensor(numbers, dtype=torch.float32)}


SAME, LOST_ONE = version(0, 0, 0, 0), version(0, 0, 0, 9)


def judge(trusted=40, held=0, target=0.0):
    """Held-out events whose right answers are 0, and those of the stream `target`."""
    config = OnlineConfig(**CONFIG.model_dump())
    learner = Learner(Toy(), config)
    for i in range(trusted):
        learner.held.trust(Item(f"t{i}", "curated", lesson(f"t{i}", i, 0.0)))
    for i in range(held):
        learner.held.offer(Item(f"h{i}", f"u{i}", lesson(f"h{i}", i, target)))
    return Judge(learner.trainee, learner, config), config


def lesson(id, i, target):
    return {"skill": i % SKILLS, "target": target, "id": id}


def replayed(made, config, live, candidate):
    trial = Trial.of(1, config, made.strata())
    made.replay(trial, live, candidate)
    return trial


def test_an_equal_candidate_is_decided_at_once_and_only_what_comes_in_is_waited_for():
    made, config = judge(held=20)
    trial = replayed(made, config, SAME, SAME)
    assert made.strata() == [HELD, TRUSTED] and trial.decided(HELD) and trial.decided(TRUSTED)
    assert trial.canary.decision == "HOLD" and not trial.stuck


def test_a_gain_on_the_stream_hides_no_loss_on_what_is_trusted():
    """It wins all 60 events of the stream and loses ten of forty trusted ones: together a gain."""
    made, config = judge(held=60, target=9.0)
    trial = replayed(made, config, SAME, version(9, 9, 9, 9))
    assert trial.canary.decision == "ROLLBACK" and "trusted: a loss" in trial.canary.reason
    trial = replayed(made, config, SAME, LOST_ONE)
    assert trial.canary.decision == "ROLLBACK" and "trusted: a loss" in trial.canary.reason


def test_promotions_one_after_the_other_may_not_lose_the_margin_each():
    """The version in use has lost a quarter; one like it does not pass, one like the first does."""
    made, config = judge()
    replayed(made, config, SAME, SAME)
    made.live = {}  # another version is in use now
    assert replayed(made, config, LOST_ONE, LOST_ONE).canary.decision == "ROLLBACK"
    assert replayed(made, config, LOST_ONE, SAME).decided(TRUSTED)


def test_what_cannot_be_decided_is_stuck_and_says_so():
    """A loss of exactly the margin is neither ruled out nor shown."""
    made, config = judge()
    made.config = config.model_copy(update={"margin": 0.25, "tolerance": 0.25, "replay_events": 40})
    trial = Trial.of(1, made.config, made.strata())
    made.replay(trial, SAME, LOST_ONE)
    assert trial.canary.decision == "HOLD" and trial.undecided(0, 40) == trial.stuck
    assert trial.stuck.startswith("undecided on what is trusted: score trusted: no loss of 0.25")
    assert Trial.from_state(json.loads(json.dumps(trial.state()))).state() == trial.state()


def test_a_candidate_that_raises_is_rolled_back():
    made, config = judge()
    trial = replayed(made, config, SAME, version(float("nan"), 0, 0, 0))
    assert trial.canary.decision == "ROLLBACK" and "FloatingPointError" in trial.canary.reason


def test_a_candidate_without_a_score_is_rolled_back():
    made, config = judge()
    answers = made.trainee.answers
    made.trainee.answers = lambda weights, turns, draws: [
        replace(a, score=None) if weights is not SAME else a for a in answers(weights, turns, draws)
    ]
    trial = replayed(made, config, SAME, LOST_ONE)
    assert trial.canary.decision == "ROLLBACK" and "score trusted is None" in trial.canary.reason


def test_an_id_that_is_held_out_and_trusted_is_two_events():
    """The stream and the file of trusted rows number their rows by themselves."""
    made, config = judge(held=20, target=9.0)
    made.learner.held.trusted = [
        replace(i, id=i.id.replace("t", "h")) for i in made.learner.held.trusted
    ]
    replayed(made, config, SAME, SAME)
    assert set(made.live[HELD].values()) == {0.0} and set(made.live[TRUSTED].values()) == {1.0}


def test_held_out_events_of_too_few_sources_are_no_stratum():
    made, config = judge(trusted=0, held=20)
    assert made.strata() == [HELD]
    few = Learner(Toy(), config)
    few.held.offer(Item("h", "u", lesson("h", 0, 0.0)))
    assert Judge(few.trainee, few, config).strata() == []


def test_a_version_is_asked_once_about_what_is_replayed():
    made, config = judge(held=20)
    asked, answers = [], made.trainee.answers
    made.trainee.answers = lambda weights, turns, draws: (
        asked.extend(t.row.id for t in turns if weights is SAME),
        answers(weights, turns, draws),
    )[1]
    for _ in range(3):
        replayed(made, config, SAME, LOST_ONE)
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("shown", [True, False])
def test_the_shadow_of_an_undecided_candidate_goes_on_and_that_of_a_worse_one_begins_anew(
    tmp_path, shown
):
    with loop(tmp_path, watch_events=0) as made:
        made.go(stream(40))
        assert made.trial is not None
        shadow = made.trainee.w.clone()
        made.trial.stuck = "" if shown else "undecided"
        if shown:
            made.trial.canary.broken("it is worse")
        made._settle()
        assert moves(made) == ["rejected"] and made.trial is None
        assert torch.equal(made.trainee.w, torch.zeros(SKILLS) if shown else shadow)
