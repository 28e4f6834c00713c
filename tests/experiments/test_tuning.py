"""Successive halving: equal budgets, nothing done twice, the winner goes on from where it was."""

import math

import pytest

from bem.config import TrainingConfig, TuningConfig
from bem.errors import Diverged, TrainingError
from bem.experiments.tuning import Search
from bem.files import read_json, write_text
from bem.training.state import METRICS, STATE

RATES = (1e-3, 2e-3, 4e-3)
FINAL = {1e-3: 3.0, 2e-3: 1.0, 4e-3: 2.0}


class Trainings:
    """Trainings whose loss is known: FINAL + 1 / steps."""

    def __init__(self):
        self.asked = []

    def __call__(self, training, folder, until):
        self.asked.append((training.learning_rate, until))
        for name in (STATE, METRICS):
            write_text(folder / name, f"{training.learning_rate} {until}")
        return FINAL[training.learning_rate] + 1 / until


def silent(what, trial, of):
    pass


def search(tmp_path, **facts):
    tuning = TuningConfig(rates=RATES, steps=8)
    return Search("s0", tmp_path / "tuning", tuning, TrainingConfig(steps=20), facts)


def test_the_better_half_goes_on_and_the_best_is_chosen(tmp_path):
    trainings, told = Trainings(), []
    tuned = search(tmp_path).tuned(trainings, lambda *event: told.append(event))
    assert trainings.asked == [(1e-3, 4), (2e-3, 4), (4e-3, 4), (2e-3, 8), (4e-3, 8)]
    assert tuned == TrainingConfig(steps=20, learning_rate=2e-3)
    assert told[-1] == ("rate 0.004 for 8 steps", 5, 5)
    record = read_json(search(tmp_path).record, TrainingError)
    assert record["chosen"] == 2e-3
    assert record["trials"][0] == {"rate": 1e-3, "steps": 4, "loss": 3.25}


def test_a_finished_search_and_finished_trials_are_not_repeated(tmp_path):
    interrupted = Trainings()

    def stop_at_the_third(training, folder, until):
        if len(interrupted.asked) == 2:
            raise KeyboardInterrupt
        return interrupted(training, folder, until)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path).tuned(stop_at_the_third, silent)
    resumed = Trainings()
    search(tmp_path).tuned(resumed, silent)
    assert resumed.asked == [(4e-3, 4), (2e-3, 8), (4e-3, 8)]
    search(tmp_path).tuned(resumed, silent)
    assert len(resumed.asked) == 3


def test_another_base_or_data_begins_anew(tmp_path):
    search(tmp_path, base="a").tuned(Trainings(), silent)
    again = Trainings()
    search(tmp_path, base="b").tuned(again, silent)
    assert len(again.asked) == 5


def test_a_rate_that_diverges_loses(tmp_path):
    def diverging(training, folder, until):
        if training.learning_rate > 1e-3:
            raise Diverged("inf")
        return 9.0

    assert search(tmp_path).tuned(diverging, silent).learning_rate == 1e-3
    record = read_json(search(tmp_path).record, TrainingError)
    assert [trial["loss"] for trial in record["trials"][:3]] == [9.0, None, None]


def test_rates_that_all_diverge_are_an_error_that_names_them(tmp_path):
    with pytest.raises(TrainingError, match=r"s0: .*0\.001, 0\.002, 0\.004"):
        search(tmp_path).tuned(lambda *trial: math.nan, silent)


def test_a_handing_over_that_was_killed_half_way_is_done_again(tmp_path):
    tuned = search(tmp_path).tuned(Trainings(), silent)
    cell, won = tmp_path / "cell", search(tmp_path).state_of(tuned.learning_rate)
    cell.mkdir()
    (won / METRICS).replace(cell / METRICS)  # killed here
    search(tmp_path).hand_over(tuned.learning_rate, cell)
    assert (cell / STATE).read_text() == (cell / METRICS).read_text() == "0.002 8"


def test_the_winner_hands_its_state_over_once(tmp_path):
    tuned = search(tmp_path).tuned(Trainings(), silent)
    cell = tmp_path / "cell"
    search(tmp_path).hand_over(tuned.learning_rate, cell)
    assert (cell / STATE).read_text() == "0.002 8"
    assert not (tmp_path / "tuning" / "s0").exists()
    (cell / STATE).write_text("further on")
    search(tmp_path).hand_over(tuned.learning_rate, cell)
    assert (cell / STATE).read_text() == "further on"
